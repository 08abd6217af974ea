"""The attention of one token on a CPU, in NumPy: pages are read, not decompressed.

The numbers are those of ``attention.attend`` over ``codec.decode`` within float32's rounding.
Levels come from tables of all bytes, scales multiply logits and weights instead of elements, and
what is made of the pages is a slice of tokens at a time, which stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from . import codec
from .centre import TURN, TWO_PI, Centre
from .codebook import Codebook, key_codebook, value_codebook
from .layout import PLANE_BITS, PageLayout
from .rotation import rotate, unrotate

SLICE = 512  # tokens; a multiple of every block size


def attend_token(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    pages: mx.array,
    blocks: Sequence[int],
    past_length: int,
    layout: PageLayout,
    *,
    scale: float,
    sinks: mx.array | None = None,
    centre: Centre | None = None,
    shift: int = 0,
) -> mx.array:
    """Attend from one token to the past and to recent tokens, itself the last of them.

    Args:
        queries: ``(1, num_heads, 1, head_dim)``.
        keys: ``(1, num_kv_heads, R, head_dim)``, as the model made them.
        values: the same shape.
        pages: uint8 ``(num_blocks, num_kv_heads, page_bytes)``; only ``blocks`` are read.
        blocks: the blocks that hold the past, in order.
        past_length: tokens of the past.
        layout: the layout of the pages.
        scale: factor of the logits.
        sinks: a learned logit for each head, ``(num_heads,)``, or None.
        centre: what the pages were encoded with, or None.
        shift: position less index of the past's tokens; see ``dispatch.attend``.

    Returns:
        ``(1, num_heads, 1, head_dim)`` in the queries' dtype.
    """
    num_heads, num_kv_heads = queries.shape[1], keys.shape[1]
    dtype, queries = queries.dtype, queries.astype(mx.float32)
    raw_q, raw_k, raw_v = queries, keys.astype(mx.float32), values.astype(mx.float32)
    rotated = rotate(centre.unsmooth(queries) if centre else queries)
    mx.eval(rotated, raw_q, raw_k, raw_v, pages)  # together: each wait is a switch between threads
    q, raw_q = (
        np.asarray(x).reshape(num_kv_heads, -1, x.shape[-1]) * np.float32(scale)
        for x in (rotated, raw_q)
    )

    # The softmax is taken as slices come: weights are relative to the peak so far.
    logits = raw_q @ np.asarray(raw_k)[0].swapaxes(1, 2)
    peak = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - peak)
    total, recent = weights.sum(axis=-1, keepdims=True), weights @ np.asarray(raw_v)[0]
    if sinks is not None:
        total = total + np.exp(np.array(sinks.astype(mx.float32)).reshape(peak.shape) - peak)
    first_peak, output = peak, np.zeros_like(q)
    levels = np.empty(num_kv_heads * SLICE * layout.dim, np.float32)
    means = _Means(centre, raw_q) if centre else None
    start = shift
    for k_planes, v_planes, scales in _slices(np.asarray(pages), blocks, past_length, layout):
        k_scales, v_scales = scales[:, None, :, 0], scales[:, None, :, 1]
        k_levels = _levels(k_planes, layout.config.k_width, key_codebook, levels)
        logits = q @ k_levels.swapaxes(1, 2) * np.abs(k_scales)
        if means:
            logits += np.where(np.signbit(k_scales), means.logits(start, logits.shape[2]), 0)
            start += logits.shape[2]
        last, peak = peak, np.maximum(peak, logits.max(axis=-1, keepdims=True))
        weights, decay = np.exp(logits - peak), np.exp(last - peak)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        v_levels = _levels(v_planes, layout.config.v_width, value_codebook, levels)
        output = output * decay + weights * np.abs(v_scales) @ v_levels
        if means:
            means.add(weights * np.signbit(v_scales), decay)
    output = unrotate(mx.array(output / total), layout.head_dim)
    # What is not rotated.
    rest = recent * np.exp(first_peak - peak)
    if means:
        rest = rest + means.values()
    output = (output + mx.array(rest / total)).reshape(1, num_heads, 1, layout.head_dim)
    return output.astype(dtype)


class _Means:
    """What the means that were left out of keys and values give, for one query per head.

    The logit of a turned mean is q . R_j mu = A cos phi(j) + B sin phi(j), summed over pairs. For
    a slice that begins at position j0, A and B are turned by phi(j0) once, and the cosines and
    sines of the slice are those of positions 0, 1, ...: integer phases add up exactly.

    Args:
        centre: calibration of the layer.
        queries: float32 ``(num_kv_heads, group, head_dim)``, as the model made them, times scale.
    """

    def __init__(self, centre: Centre, queries: np.ndarray):
        self._pairs = centre.pairs.tobytes()
        first, second = centre.pairs[:, 0], centre.pairs[:, 1]
        mu = np.array(centre.mu)[:, None]
        a, b = (queries[..., x] for x in (first, second))
        mu_a, mu_b = mu[..., first], mu[..., second]
        self._cos, self._sin = a * mu_a + b * mu_b, b * mu_a - a * mu_b
        self._value_mean = np.array(centre.value_mean)[:, None]
        self._weight: np.ndarray | float = 0.0

    def logits(self, start: int, count: int) -> np.ndarray:
        """Logits q . R_j mu at the positions from ``start``: ``(num_kv_heads, group, count)``."""
        steps = np.frombuffer(self._pairs, np.uint32).reshape(-1, 3)[:, 2]
        angle = (np.uint32(start % TURN) * steps).view(np.int32) * (TWO_PI / TURN)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        turned = [self._cos * cos + self._sin * sin, self._sin * cos - self._cos * sin]
        logits: np.ndarray = np.concatenate(turned, axis=-1) @ _waves(self._pairs)[:, :count]
        return logits

    def add(self, weights: np.ndarray, decay: np.ndarray) -> None:
        """Count the weights of flagged values, after those so far have decayed."""
        self._weight = self._weight * decay + weights.sum(axis=-1, keepdims=True)

    def values(self) -> np.ndarray:
        """The value mean times the flagged weights: ``(num_kv_heads, group, head_dim)``."""
        return self._weight * self._value_mean


@lru_cache
def _waves(pairs: bytes) -> np.ndarray:
    """Cosines, then sines, of every pair at a slice's positions: float32 ``(2 * pairs, SLICE)``."""
    steps = np.frombuffer(pairs, np.uint32).reshape(-1, 3)[:, 2]
    turns = np.arange(SLICE, dtype=np.uint32) * steps[:, None]
    angles = turns.view(np.int32) * (TWO_PI / TURN)
    return np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)


def _slices(
    pages: np.ndarray, blocks: Sequence[int], num_tokens: int, layout: PageLayout
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], np.ndarray]]:
    """Key planes, value planes ``(num_kv_heads, n, bytes)`` and float32 scales ``(..., n, 2)``."""
    block_size, num_k_planes = layout.config.block_size, len(PLANE_BITS[layout.config.k_width])
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


def _levels(
    planes: list[np.ndarray],
    width: int,
    codebook: Callable[[int], Codebook],
    out: np.ndarray,
) -> np.ndarray:
    """Levels of the codes in planes ``(num_kv_heads, n, bytes)``, put at the start of ``out``.

    Returns:
        float32 ``(num_kv_heads, n, dim)``. Writing to the same place again saves the system's
        work for new memory, which costs as much as the levels themselves.
    """
    shape = (*planes[0].shape[:2], -1)
    planes, bits = codec.unfolded(planes, width)
    codes = planes[0]
    if len(planes) > 1:  # join them first, to a byte for each code
        parts = (np.take(_fields(n), x, axis=0) for n, x in zip(bits, planes, strict=True))
        codes = codec.joined((part.reshape(shape) for part in parts), bits)
        bits = (8,)
    table = _level_table(codebook(width), *bits)
    out = out[: codes.size * table.shape[1]]
    np.take(table, codes, axis=0, out=out.reshape(*codes.shape, -1), mode="clip")
    return out.reshape(shape)


@lru_cache
def _fields(bits: int) -> np.ndarray:
    """All fields of all bytes: uint8 ``(256, 8 / bits)``."""
    return np.array(codec.fields(mx.arange(256).astype(mx.uint8)[:, None], bits))


@lru_cache
def _level_table(codebook: Codebook, bits: int) -> np.ndarray:
    """Levels of all fields of all bytes: float32 ``(256, 8 / bits)``."""
    return np.array(codebook.levels(mx.array(_fields(bits))))
