"""GPU kernels or plain MLX ops: the choice is made here and nowhere else.

Where there is a GPU, its kernels serve, once they have been checked against plain MLX ops on
this very machine. Everywhere else, and for what the kernels do not cover, the reference serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import mlx.core as mx

from . import attention, codec, cpu
from .centre import Centre
from .kernels import decode as decode_kernel
from .kernels import encode as encode_kernel
from .kernels import gather as gather_kernel
from .kernels.launch import Executor, integers, on_gpu
from .kernels.selfcheck import check
from .layout import PageLayout
from .pages import BlockTable, places, scatter
from .tail import Tail

SLICE = 4096  # tokens to which means are added at a time, in float32; whole blocks
COMPILED = 1024  # functions kept: with centres each layer has its own


@lru_cache
def executor(layout: PageLayout) -> Executor | None:
    """What runs the kernels for this layout, or None where the reference serves."""
    if mx.default_device() != mx.gpu or layout.dim > decode_kernel.MAX_DIM:
        return None
    served = {decode_kernel.variant_for(columns, layout.dim) for columns in range(1, 9)}
    failed = [result for result in check(layout, variants=sorted(served)) if not result.ok]
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


def store(
    keys: mx.array,
    values: mx.array,
    table: BlockTable,
    tail: Tail,
    *,
    centre: Centre | None = None,
    position: int = 0,
    uncentred: int = 0,
    make_room: Callable[[], None] = lambda: None,
) -> None:
    """Store new tokens: compressed in pages, and the last of them as they came in the tail.

    Args:
        keys: ``(num_kv_heads, L, head_dim)``, after RoPE.
        values: the same shape.
        table: the pages of the sequence.
        tail: the tail of the sequence.
        centre: calibration of the layer, or None.
        position: position of the first new token.
        uncentred: how many of them, the first ones, get no flag f.
        make_room: called once the tokens are known to be good, before anything is stored.

    Raises:
        ValueError: the shapes do not fit; or, from the reference alone, an element cannot be
            encoded. Nothing is stored then. The kernel does not wait to find out: such a vector
            becomes NaN, and shows in what is attended.
    """
    pool, layout, length = table.pool, table.pool.layout, keys.shape[1]
    codec.check_shapes(keys, values, layout)
    execute = executor(layout)
    if execute is None:
        rows = _encode(keys, values, layout, centre, position, uncentred)
        make_room()
        tail.push(keys, values, table.num_tokens)
        table.append(rows)
        return
    make_room()
    tail.prepare(keys, values)
    start = integers(position, table.num_tokens)
    where = places(table.extend(length), pool.num_kv_heads, layout)
    pool.pages, *arrays = _compiled_store(layout, centre, uncentred, execute)(
        keys, values, pool.pages, *tail.arrays, start, *where
    )
    tail.hold(tuple(arrays), length)


def _encode(
    keys: mx.array,
    values: mx.array,
    layout: PageLayout,
    centre: Centre | None,
    position: int,
    uncentred: int,
) -> mx.array:
    """Rows of new tokens by plain MLX operations."""
    if centre is None:
        return codec.encode(keys, values, layout)
    rows, positions = [], mx.arange(position, position + keys.shape[1])
    for some, its_centre in (
        (slice(None, uncentred), centre.without_mu),
        (slice(uncentred, None), centre),
    ):
        if keys[:, some].shape[1]:
            part = keys[:, some], values[:, some]
            rows.append(codec.encode(*part, layout, its_centre, positions[some]))
    return mx.concatenate(rows, axis=1)


# Compiled, a call costs the host a fraction: a kernel's source is put together once.
@lru_cache(maxsize=COMPILED)
def _compiled_store(
    layout: PageLayout, centre: Centre | None, uncentred: int, execute: Executor
) -> Callable[..., tuple[mx.array, ...]]:
    def store(keys, values, pages, tail_keys, tail_values, start, *where):
        options = {"centre": centre, "uncentred": uncentred, "execute": execute}
        rows, *arrays = encode_kernel.store(
            keys, values, (tail_keys, tail_values), layout, start=start, **options
        )
        return scatter(pages, rows, *where), *arrays

    return mx.compile(store)


@lru_cache(maxsize=COMPILED)
def _compiled_decode(
    layout: PageLayout, scale: float, max_tokens: int, centre: Centre | None, execute: Executor
) -> Callable[..., mx.array]:
    def decode(queries, pages, block_table, lengths, tail_keys, tail_values, sinks):
        tail = tail_keys, tail_values
        return decode_kernel.decode(
            queries,
            pages,
            block_table,
            lengths,
            layout,
            decode_kernel.Options(scale),
            tail=tuple(x[None].astype(queries.dtype) for x in tail),
            sinks=sinks,
            centre=centre,
            max_tokens=max_tokens,
            execute=execute,
        )

    return mx.compile(decode)


def attend_last(
    queries: mx.array,
    table: BlockTable,
    tail: Tail,
    *,
    scale: float,
    mask: attention.Mask = None,
    sinks: mx.array | None = None,
    centre: Centre | None = None,
    shift: int = 0,
) -> mx.array:
    """Attend from the last few tokens of a sequence, which are stored already.

    The tokens of the tail are seen as they came, everything older through the pages. Arguments
    and result are those of ``attend``.
    """
    layout, rows = table.pool.layout, queries.shape[2]
    past_length = table.num_tokens - tail.length
    execute = executor(layout)
    if past_length and execute and _in_order(mask, rows) and rows <= decode_kernel.MAX_ROWS:
        # A power of two, so that a growing context seldom asks for another compiled function.
        max_tokens = 1 << (past_length - 1).bit_length()
        return _compiled_decode(layout, scale, max_tokens, centre, execute)(
            queries,
            table.pool.pages,
            table.block_table,
            _lengths(past_length, table.num_tokens, shift),
            *tail.arrays,
            sinks,
        )
    keys, values = (x[None] for x in tail.ordered(table.num_tokens))
    options = {"scale": scale, "mask": mask, "sinks": sinks, "centre": centre, "shift": shift}
    return attend(queries, keys, values, table, past_length, **options)


@lru_cache(maxsize=2)
def _lengths(past_length: int, num_tokens: int, shift: int) -> mx.array:
    """What kernels call lengths. Layers share it; made of small arrays, see ``pages.places``."""
    return mx.concatenate([mx.array([past_length, num_tokens], mx.int32), integers(shift)])


def _in_order(mask: attention.Mask, rows: int) -> bool:
    """Whether each row sees all tokens before itself."""
    return mask == "causal" if isinstance(mask, str) else mask is None and rows == 1


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    table: BlockTable,
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
        table: the pages of the sequence; its first ``past_length`` tokens are the past.
        past_length: tokens that are read from pages, those before the recent ones.
        scale: factor of the logits.
        mask: as ``mx.fast.scaled_dot_product_attention`` takes it, over past and recent tokens.
        sinks: a learned logit for each head, ``(num_heads,)``, or None.
        centre: what the pages were encoded with, or None.
        shift: position less index of the past's tokens, those without a flag f aside.

    Returns:
        ``(1, num_heads, L, head_dim)`` in the queries' dtype.
    """
    layout, rows = table.pool.layout, queries.shape[2]
    execute = executor(layout)
    if past_length and not execute and rows == 1 and _in_order(mask, rows):
        return cpu.attend_token(
            queries,
            keys,
            values,
            table.pool.pages,
            table.blocks,
            past_length,
            layout,
            scale=scale,
            sinks=sinks,
            centre=centre,
            shift=shift,
        )
    past = _read(table, past_length, queries.dtype, execute, centre, shift)
    return attention.attend(
        queries, keys, values, past, scale=scale, mask=mask, sinks=sinks, centre=centre
    )


def _read(
    table: BlockTable,
    past_length: int,
    dtype: mx.Dtype,
    execute: Executor | None,
    centre: Centre | None,
    shift: int,
) -> list[mx.array]:
    """Rotated keys and values of the past, ``(1, num_kv_heads, past_length, dim)`` each."""
    pool = table.pool
    if past_length == 0:
        return [mx.zeros((1, pool.num_kv_heads, 0, pool.layout.dim), dtype)] * 2
    if execute is None:
        pages = table.read(past_length)
        slots = pages.shape[1] * pool.layout.config.block_size
        past = codec.decode(pages, pool.layout, centre, mx.arange(shift, shift + slots))
        return [x.flatten(1, 2)[None, :, :past_length] for x in past]
    blocks = table.block_table[0]
    past = gather_kernel.gather(pool.pages, blocks, past_length, pool.layout, dtype, execute)
    if centre:
        past = _with_means(past, table, centre, shift)
    return [x[None] for x in past]


def _with_means(
    past: Sequence[mx.array], table: BlockTable, centre: Centre, shift: int
) -> list[mx.array]:
    """What gather made of pages, with the means of flagged tokens, slice by slice."""
    size = table.pool.layout.config.block_size
    slices = []
    for start in range(0, past[0].shape[1], SLICE):
        keys, values = (x[:, start : start + SLICE] for x in past)
        count = keys.shape[1]
        pages = table.pool.read(table.blocks[start // size : -(-(start + count) // size)])
        flags = (x.flatten(1)[:, :count] for x in codec.flags(pages, table.pool.layout))
        positions = mx.arange(start + shift, start + shift + count)
        means_added = codec.add_means(keys, values, *flags, centre, positions)
        slices.append([x.astype(keys.dtype) for x in means_added])
    return [mx.concatenate(x, axis=1) for x in zip(*slices, strict=True)]
