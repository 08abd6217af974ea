"""The attention of one token on a CPU, in NumPy: pages are read, not decompressed.

The numbers are those of ``attention.attend`` over ``codec.decode`` within float32's rounding.
Levels come from tables of all bytes, scales multiply logits and weights instead of elements, and
what is made of the pages is a slice of tokens at a time, which stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from . import codec
from .codebook import Gaussian, Uniform, key_codebook, value_codebook
from .layout import PLANE_BITS, PageLayout
from .rotation import rotate, unrotate

SLICE = 512  # tokens; a multiple of every block size


def attend_token(
    queries: mx.array,
    key: mx.array,
    value: mx.array,
    pages: mx.array,
    blocks: Sequence[int],
    past_length: int,
    layout: PageLayout,
    *,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend from one token to the past and to the token itself.

    Args:
        queries: ``(1, num_heads, 1, head_dim)``.
        key: ``(1, num_kv_heads, 1, head_dim)``, as the model made it.
        value: the same shape.
        pages: uint8 ``(num_blocks, num_kv_heads, page_bytes)``; only ``blocks`` are read.
        blocks: the blocks that hold the past, in order.
        past_length: tokens of the past.
        layout: the layout of the pages.
        scale: factor of the logits.
        sinks: a learned logit for each head, ``(num_heads,)``, or None.

    Returns:
        ``(1, num_heads, 1, head_dim)`` in the queries' dtype.
    """
    num_heads, num_kv_heads = queries.shape[1], key.shape[1]
    rotated = rotate(mx.concatenate([queries, key, value], axis=1))[0]
    mx.eval(rotated, pages)  # together: each wait costs a switch between threads
    q, k, v = np.split(np.asarray(rotated), [num_heads, num_heads + num_kv_heads])
    q = q.reshape(num_kv_heads, -1, layout.dim) * np.float32(scale)

    # The softmax is taken as slices come: weights are relative to the peak so far.
    peak = q @ k.swapaxes(1, 2)
    total, output = np.ones_like(peak), v
    if sinks is not None:
        total = total + np.exp(np.array(sinks.astype(mx.float32)).reshape(peak.shape) - peak)
    levels = np.empty(num_kv_heads * SLICE * layout.dim, np.float32)
    for k_planes, v_planes, scales in _slices(np.asarray(pages), blocks, past_length, layout):
        k_scales, v_scales = scales[:, None, :, 0], scales[:, None, :, 1]
        k_levels = _levels(k_planes, key_codebook(layout.config.k_bits), levels)
        logits = q @ k_levels.swapaxes(1, 2) * k_scales
        last, peak = peak, np.maximum(peak, logits.max(axis=-1, keepdims=True))
        weights, decay = np.exp(logits - peak), np.exp(last - peak)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        v_levels = _levels(v_planes, value_codebook(layout.config.v_bits), levels)
        output = output * decay + weights * v_scales @ v_levels
    output = mx.array(output / total).reshape(1, num_heads, 1, layout.dim)
    return unrotate(output, layout.head_dim).astype(queries.dtype)


def _slices(pages: np.ndarray, blocks: Sequence[int], num_tokens: int, layout: PageLayout):
    """Key planes, value planes ``(num_kv_heads, n, bytes)`` and float32 scales ``(..., n, 2)``."""
    block_size, num_k_planes = layout.config.block_size, len(PLANE_BITS[layout.config.k_bits])
    blocks, ends = np.array(blocks), np.cumsum(layout.plane_bytes)
    for start in range(0, num_tokens, SLICE):
        end = min(start + SLICE, num_tokens)
        some = np.take(pages, blocks[start // block_size : -(-end // block_size)], axis=0)
        unit, offsets = _offsets(layout)
        rows = np.take(some.view(unit), offsets, axis=-1).view(np.uint8).swapaxes(0, 1)
        rows = rows.reshape(len(rows), -1, layout.row_bytes)[:, : end - start]
        *planes, scales = np.split(rows, ends, axis=-1)
        scales = np.ascontiguousarray(scales).view(np.float16).astype(np.float32)
        yield planes[:num_k_planes], planes[num_k_planes:], scales


@lru_cache
def _offsets(layout: PageLayout) -> tuple[type, np.ndarray]:
    """Where rows lie in pages, in units of two bytes where the layout keeps pairs together."""
    pairs = layout.byte_offsets.reshape(layout.config.block_size, -1, 2)
    together = (pairs[..., 0] % 2 == 0) & (pairs[..., 1] == pairs[..., 0] + 1)
    if together.all():
        return np.uint16, pairs[..., 0] // 2
    return np.uint8, layout.byte_offsets


def _levels(planes: list[np.ndarray], codebook: Uniform | Gaussian, out: np.ndarray) -> np.ndarray:
    """Levels of the codes in planes ``(num_kv_heads, n, bytes)``, put at the start of ``out``.

    Returns:
        float32 ``(num_kv_heads, n, dim)``. Writing to the same place again saves the system's
        work for new memory, which costs as much as the levels themselves.
    """
    shape = (*planes[0].shape[:2], -1)
    codes, widths = planes[0], PLANE_BITS[codebook.bits]
    if len(planes) > 1:  # join them first, to a byte for each code
        low, high = (
            np.take(_fields(width), plane, axis=0).reshape(shape)
            for plane, width in zip(planes, widths, strict=True)
        )
        codes, widths = low | high << widths[0], (8,)
    table = _level_table(codebook, *widths)
    out = out[: codes.size * table.shape[1]]
    np.take(table, codes, axis=0, out=out.reshape(*codes.shape, -1), mode="clip")
    return out.reshape(shape)


@lru_cache
def _fields(width: int) -> np.ndarray:
    """All fields of all bytes: uint8 ``(256, 8 / width)``."""
    return np.array(codec.fields(mx.arange(256).astype(mx.uint8)[:, None], width))


@lru_cache
def _level_table(codebook: Uniform | Gaussian, width: int) -> np.ndarray:
    """Levels of all fields of all bytes: float32 ``(256, 8 / width)``."""
    return np.array(codebook.levels(mx.array(_fields(width))))
