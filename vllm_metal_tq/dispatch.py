"""GPU kernels or plain MLX ops: the choice is made here and nowhere else.

Where there is a GPU, its kernels serve, once they have been checked against plain MLX ops on
this very machine. Everywhere else, and for what the kernels do not cover, the reference serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from . import attention, codec, cpu
from .centre import Centre
from .kernels import decode as decode_kernel
from .kernels import encode as encode_kernel
from .kernels import gather as gather_kernel
from .kernels.launch import Executor, integers, on_gpu
from .kernels.selfcheck import check
from .layout import PageLayout
from .pages import BlockTable, PagePool, Slots, places, scatter
from .rotation import unrotate
from .tail import Tail

SLICE = 512  # tokens decompressed at a time, in float32; whole blocks
RESTORED = 4096  # tokens rotated back at a time, in float32
COMPILED = 1024  # functions kept: with centres each layer has its own


@lru_cache
def executor(layout: PageLayout) -> Executor | None:
    """What runs the kernels for this layout, or None where the reference serves.

    Beyond ``decode_kernel.MAX_DIM`` these are encode and gather; ``attend_last`` then declines.
    """
    if mx.default_device() != mx.gpu or layout.dim > encode_kernel.MAX_DIM:
        return None
    columns = range(1, 9) if layout.dim <= decode_kernel.MAX_DIM else ()
    variants = sorted({decode_kernel.variant_for(count, layout.dim) for count in columns})
    failed = [result for result in check(layout, variants=variants) if not result.ok]
    if not failed:
        return on_gpu
    names = ", ".join(f"{result.name} ({result.message or 'wrong result'})" for result in failed)
    warnings.warn(
        f"GPU kernels failed their check for {layout.config.label} at head_dim {layout.head_dim}: "
        f"{names}. Plain MLX operations serve instead, slower. Please report this with the "
        "output of `vllm-metal-tq doctor --json`.",
        stacklevel=2,
    )
    return None


@dataclass
class Chunk:
    """New tokens of some sequences, as many of each, and where they go.

    Attributes:
        keys: ``(B, num_kv_heads, L, head_dim)``, after RoPE.
        values: the same shape.
        tables: the pages of each sequence, all of one pool.
        offsets: the position of each sequence's first new token.
        uncentred: how many of the new tokens, the first ones, get no flag f.
    """

    keys: mx.array
    values: mx.array
    tables: list[BlockTable]
    offsets: list[int]
    uncentred: int = 0

    @property
    def length(self) -> int:
        """L."""
        return self.keys.shape[2]

    @property
    def pool(self) -> PagePool:
        """Where the pages are."""
        return self.tables[0].pool

    def room(self) -> Slots:
        """Make room in pages; returns the slots of the new tokens."""
        return tuple(table.extend(self.length) for table in self.tables)


def encode(chunk: Chunk, centre: Centre | None = None) -> mx.array | None:
    """What can be done about new tokens before anything is stored: ``store`` takes it.

    Raises:
        ValueError: the shapes do not fit; or, from the reference alone, an element cannot be
            encoded. The kernel does not wait to find out: such a vector becomes NaN, and shows in
            what is attended.
    """
    layout = chunk.pool.layout
    codec.check_shapes(chunk.keys, chunk.values, layout)
    return None if executor(layout) else _encode(chunk, centre)


def store(chunk: Chunk, tail: Tail, encoded: mx.array | None, centre: Centre | None = None) -> None:
    """Store new tokens: compressed in pages, and the last of them as they came in the tail.

    Args:
        chunk: the tokens.
        tail: the tails of the chunk's sequences.
        encoded: what ``encode`` made of the chunk.
        centre: calibration of the layer, or None.

    Raises:
        OutOfBlocks: the pool is full.
    """
    execute = executor(chunk.pool.layout)
    if execute:
        _store_on_gpu(chunk, tail, centre, execute)
    else:
        assert encoded is not None  # encode leaves nothing but to kernels
        tail.push(chunk.keys, chunk.values, [table.num_tokens for table in chunk.tables])
        chunk.pool.write(chunk.room(), encoded)
        # Or they would keep the whole chunk's keys and values until the model is through.
        mx.eval(tail.arrays)


def _store_on_gpu(chunk: Chunk, tail: Tail, centre: Centre | None, execute: Executor) -> None:
    pool, layout = chunk.pool, chunk.pool.layout
    rings = tail.prepare(chunk.keys, chunk.values)
    starts = _starts(*chunk.offsets, *(table.num_tokens for table in chunk.tables))
    where = places(chunk.room(), pool.num_kv_heads, layout)
    pool.pages, keys, values = _compiled_store(layout, centre, chunk.uncentred, execute)(
        chunk.keys, chunk.values, pool.pages, *rings, starts, *where
    )
    tail.hold((keys, values), chunk.length)


@lru_cache(maxsize=32)
def _starts(*values: int) -> mx.array:
    """Of each sequence position and index of its first new token, int32, in this order."""
    if len(values) == 2:
        return integers(*values)
    return mx.array(np.array(values, np.int32).reshape(2, -1).T)


def _encode(chunk: Chunk, centre: Centre | None) -> mx.array:
    """Rows ``(B, num_kv_heads, L, row_bytes)`` of new tokens by plain MLX operations."""
    layout, (batch, heads, length, _) = chunk.pool.layout, chunk.keys.shape
    keys, values = (x.swapaxes(0, 1).flatten(1, 2) for x in (chunk.keys, chunk.values))
    if centre is None:
        rows = codec.encode(keys, values, layout)
    else:
        positions = mx.array(chunk.offsets, mx.int32)[:, None] + mx.arange(length)
        rows = _encode_centred(keys, values, layout, centre, positions, chunk.uncentred)
    return rows.reshape(heads, batch, length, layout.row_bytes).swapaxes(0, 1)


def _encode_centred(
    keys: mx.array,
    values: mx.array,
    layout: PageLayout,
    centre: Centre,
    positions: mx.array,
    uncentred: int,
) -> mx.array:
    """Rows of tokens with these positions, ``(B, L)``, of each sequence some without a mean."""
    rows = codec.encode(keys, values, layout, centre, positions.flatten())
    if uncentred:
        plain = codec.encode(keys, values, layout, centre.without_mu, positions.flatten())
        first = mx.broadcast_to(mx.arange(positions.shape[1]) < uncentred, positions.shape)
        rows = mx.where(first.flatten()[:, None], plain, rows)
    return rows


# Compiled, a call costs the host a fraction: a kernel's source is put together once.
@lru_cache(maxsize=COMPILED)
def _compiled_store(
    layout: PageLayout, centre: Centre | None, uncentred: int, execute: Executor
) -> Callable[..., tuple[mx.array, ...]]:
    def store(
        keys: mx.array,
        values: mx.array,
        pages: mx.array,
        tail_keys: mx.array,
        tail_values: mx.array,
        starts: mx.array,
        *where: mx.array,
    ) -> tuple[mx.array, ...]:
        rows, *rings = encode_kernel.store(
            keys,
            values,
            (tail_keys, tail_values),
            layout,
            starts=starts,
            centre=centre,
            uncentred=uncentred,
            execute=execute,
        )
        return scatter(pages, rows, *where), *rings

    return mx.compile(store)


@lru_cache(maxsize=COMPILED)
def _compiled_decode(
    layout: PageLayout,
    options: decode_kernel.Options,
    max_tokens: int,
    centre: Centre | None,
    execute: Executor,
) -> Callable[..., mx.array]:
    def decode(
        queries: mx.array,
        pages: mx.array,
        block_table: mx.array,
        lengths: mx.array,
        tail_keys: mx.array,
        tail_values: mx.array,
        sinks: mx.array | None,
    ) -> mx.array:
        dtype = queries.dtype
        return decode_kernel.decode(
            queries,
            pages,
            block_table,
            lengths,
            layout,
            options,
            tail=(tail_keys.astype(dtype), tail_values.astype(dtype)),
            sinks=sinks,
            centre=centre,
            max_tokens=max_tokens,
            execute=execute,
        )

    return mx.compile(decode)


def attend_last(
    queries: mx.array,
    tables: Sequence[BlockTable],
    tail: Tail,
    block_table: mx.array,
    shifts: Sequence[int],
    *,
    scale: float,
    mask: attention.Mask = None,
    sinks: mx.array | None = None,
    centre: Centre | None = None,
    window: int = 0,
) -> mx.array | None:
    """Attend from the last few tokens of some sequences, which are stored already, in one call.

    The tokens of the tails are seen as they came, everything older through the pages.

    Args:
        queries: ``(B, num_heads, L, head_dim)``.
        tables: the pages of each sequence.
        tail: the tails of the sequences.
        block_table: the blocks of ``tables``, int32 ``(B, max_blocks)``.
        shifts: of each sequence what ``attend`` calls shift.
        scale: as for ``attend``, as all that follow.
        mask: None or "causal" are served.
        sinks: as for ``attend``.
        centre: as for ``attend``.
        window: how many tokens a query sees, itself included; 0 is all.

    Returns:
        ``(B, num_heads, L, head_dim)``, or None where the kernels do not serve.
    """
    pool, rows, dim = tables[0].pool, queries.shape[2], tables[0].pool.layout.dim
    past = [table.num_tokens - n for table, n in zip(tables, tail.lengths, strict=True)]
    execute = executor(pool.layout)
    fits = rows <= decode_kernel.MAX_ROWS and dim <= decode_kernel.MAX_DIM
    served = fits and _in_order(mask, rows)
    if not execute or not served or not tail.arrays or not max(past):
        return None
    # A power of two, so that a growing context seldom asks for another compiled function.
    max_tokens = 1 << (max(past) - 1).bit_length()
    ends = (table.num_tokens for table in tables)
    options = decode_kernel.Options(scale, window)
    return _compiled_decode(pool.layout, options, max_tokens, centre, execute)(
        queries, pool.pages, block_table, _lengths(*past, *ends, *shifts), *tail.arrays, sinks
    )


@lru_cache(maxsize=32)
def _lengths(*values: int) -> mx.array:
    """What kernels call lengths, from three numbers a sequence. Layers share it."""
    if len(values) == 3:  # made of small arrays, see pages.places
        lengths = mx.concatenate([mx.array(values[:2], mx.int32), integers(values[2])])
        mx.async_eval(lengths)  # see pages.places
        return lengths
    return mx.array(np.array(values, np.int32).reshape(3, -1).T)


def _in_order(mask: attention.Mask, rows: int) -> bool:
    """Whether each row sees all tokens before itself."""
    return mask == "causal" if isinstance(mask, str) else mask is None and rows == 1


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    pool: PagePool,
    blocks: list[int],
    past_length: int,
    *,
    scale: float,
    mask: attention.Mask = None,
    sinks: mx.array | None = None,
    centre: Centre | None = None,
    shift: int = 0,
) -> mx.array:
    """Attend from a chunk of new tokens to a past in pages and to recent tokens.

    Args:
        queries: ``(1, num_heads, L, head_dim)``.
        keys: ``(1, num_kv_heads, R, head_dim)`` of the ``R >= L`` recent tokens, the chunk last,
            as the model made them.
        values: the same shape.
        pool: where the past is.
        blocks: its blocks, in order.
        past_length: tokens that are read from pages, those before the recent ones.
        scale: factor of the logits.
        mask: as ``mx.fast.scaled_dot_product_attention`` takes it, over past and recent tokens.
        sinks: a learned logit for each head, ``(num_heads,)``, or None.
        centre: what the pages were encoded with, or None.
        shift: position less index of the past's tokens, those without a flag f aside.

    Returns:
        ``(1, num_heads, L, head_dim)`` in the queries' dtype.

    Raises:
        ValueError: a block is not there, or the past does not fit the blocks.
    """
    layout, rows = pool.layout, queries.shape[2]
    pool.check(blocks)
    if past_length > len(blocks) * layout.config.block_size:
        raise ValueError(f"{past_length} tokens are more than {len(blocks)} blocks hold")
    execute = executor(layout)
    if past_length and not execute and rows == 1 and _in_order(mask, rows):
        return cpu.attend_token(
            queries,
            keys,
            values,
            pool.pages,
            blocks,
            past_length,
            layout,
            scale=scale,
            sinks=sinks,
            centre=centre,
            shift=shift,
        )
    past = _read(pool, blocks, past_length, keys.shape[2], queries.dtype, execute, centre, shift)
    return attention.attend(
        queries, keys, values, past, scale=scale, mask=mask, sinks=sinks, centre=centre
    )


def restore(
    keys: mx.array,
    values: mx.array,
    pool: PagePool,
    blocks: list[int],
    past_length: int,
    *,
    centre: Centre | None = None,
    shift: int = 0,
) -> tuple[mx.array, mx.array]:
    """Keys and values of a past in pages as the model made them, but for the codes' error.

    Args:
        keys: ``(1, num_kv_heads, R, head_dim)`` of the recent tokens, which come after the past.
        values: the same shape.
        pool: as for ``attend``, as all that follow.
        blocks: its blocks, in order.
        past_length: tokens that are read from pages.
        centre: what the pages were encoded with, or None.
        shift: position less index of the past's tokens.

    Returns:
        ``(1, num_kv_heads, past_length + R, head_dim)`` each in the keys' dtype.
    """
    if not past_length:
        return keys, values
    layout = pool.layout
    past = _read(pool, blocks, past_length, 0, keys.dtype, executor(layout), centre, shift)
    room = [(0, 0), (0, 0), (0, keys.shape[2]), (0, 0)]
    restored = [mx.pad(x[..., : layout.head_dim], room) for x in past]
    for start in range(0, past_length, RESTORED):
        for i, rotated in enumerate(past):
            part = unrotate(rotated[:, :, start : start + RESTORED], layout.head_dim)
            if i == 0 and centre:
                part = part / centre.smoothing[:, None]
            where = mx.array([start])
            restored[i] = mx.slice_update(restored[i], part.astype(keys.dtype), where, (2,))
        mx.eval(restored)  # as in _read
    where = mx.array([past_length])
    all_keys, all_values = (
        mx.slice_update(old, new.astype(old.dtype), where, (2,))
        for old, new in zip(restored, (keys, values), strict=True)
    )
    return all_keys, all_values


def _read(
    pool: PagePool,
    blocks: list[int],
    past_length: int,
    room: int,
    dtype: mx.Dtype,
    execute: Executor | None,
    centre: Centre | None,
    shift: int,
) -> list[mx.array]:
    """Rotated keys and values of the past: ``(1, num_kv_heads, past_length + room, dim)`` each.

    Made slice by slice in place, so that they are in memory once.
    """
    layout, size = pool.layout, pool.layout.config.block_size
    shape = 1, pool.num_kv_heads, past_length + room, layout.dim
    if past_length and execute:
        table = mx.array(blocks, mx.int32)
        gathered = gather_kernel.gather(
            pool.pages, table, past_length, layout, dtype, execute, room=room
        )
        past = [x[None] for x in gathered]
        if not centre:
            return past
    else:
        past = [mx.zeros(shape, dtype), mx.zeros(shape, dtype)]
    for start in range(0, past_length, SLICE):
        count = min(SLICE, past_length - start)
        pages = pool.read(blocks[start // size : -(-(start + count) // size)])
        positions = mx.arange(start + shift, start + shift + count)
        if execute:
            keys, values = (x[0, :, start : start + count] for x in past)
            f, g = (x.flatten(1)[:, :count] for x in codec.flags(pages, layout))
            assert centre  # without one all is done
            parts = codec.add_means(keys, values, f, g, centre, positions)
        else:
            slots = mx.arange(start + shift, start + shift + pages.shape[1] * size)
            decoded = codec.decode(pages, layout, centre, slots)
            parts = (x.flatten(1, 2)[:, :count] for x in decoded)
        for i, part in enumerate(parts):
            past[i] = mx.slice_update(past[i], part[None].astype(dtype), mx.array([start]), (2,))
        mx.eval(past)  # or MLX would have the parts of all slices in memory together
    return past
