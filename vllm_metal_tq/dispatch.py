"""GPU kernels or plain MLX ops: the choice is made here and nowhere else.

Where there is a GPU, its kernels serve, once they have been checked against plain MLX ops on
this very machine. Everywhere else, and for what the kernels do not cover, the reference serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
from .pages import BlockTable


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


def encode(
    keys: mx.array,
    values: mx.array,
    layout: PageLayout,
    centre: Centre | None = None,
    start: int = 0,
) -> mx.array:
    """Compress keys and values of new tokens, ``(num_kv_heads, num_tokens, head_dim)`` each.

    Args:
        keys: after RoPE.
        values: the same shape.
        layout: the page layout.
        centre: calibration of the layer, or None.
        start: position of the first token.

    Returns:
        uint8 ``(num_kv_heads, num_tokens, row_bytes)``.

    Raises:
        ValueError: the shapes do not fit; or, from the reference alone, an element cannot be
            encoded. The kernel does not wait to find out: such a vector becomes NaN, and shows
            in what is attended.
    """
    codec.check_shapes(keys, values, layout)
    execute = executor(layout) if centre is None else None
    if execute is None:
        positions = mx.arange(start, start + keys.shape[1]) if centre else None
        return codec.encode(keys, values, layout, centre, positions)
    return _compiled_encode(layout, execute)(keys, values)


@lru_cache
def _compiled_encode(layout: PageLayout, execute: Executor) -> Callable[..., mx.array]:
    # Compiled, a call costs the host a fraction: the kernel's source is put together once.
    return mx.compile(lambda *chunk: encode_kernel.encode(*chunk, layout, execute))


@lru_cache
def _compiled_decode(
    layout: PageLayout, options: decode_kernel.Options, max_tokens: int, execute: Executor
) -> Callable[..., mx.array]:
    def decode(queries, pages, block_table, lengths, keys, values, sinks):
        return decode_kernel.decode(
            queries,
            pages,
            block_table,
            lengths,
            layout,
            options,
            tail=tuple(_ring(x.astype(queries.dtype), lengths[0]) for x in (keys, values)),
            sinks=sinks,
            max_tokens=max_tokens,
            execute=execute,
        )

    return mx.compile(decode)


def _ring(chunk: mx.array, first: mx.array) -> mx.array:
    """A chunk's tokens in the slots of a ring; ``first`` is the index of the first of them."""
    tokens = (mx.arange(decode_kernel.TAIL) - first) % decode_kernel.TAIL
    return chunk[:, :, mx.minimum(tokens, chunk.shape[2] - 1)]


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
    execute = executor(layout) if centre is None else None
    in_order = mask == "causal" if isinstance(mask, str) else mask is None and rows == 1
    if past_length and execute and in_order and rows <= decode_kernel.MAX_ROWS:
        # A power of two, so that a growing context seldom asks for another compiled function.
        max_tokens = 1 << (past_length - 1).bit_length()
        return _compiled_decode(layout, decode_kernel.Options(scale), max_tokens, execute)(
            queries,
            table.pool.pages,
            table.block_table,
            integers(past_length, past_length + keys.shape[2], shift),
            keys,
            values,
            sinks,
        )
    if past_length and not execute and in_order and rows == 1:
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
    return [x[None] for x in past]
