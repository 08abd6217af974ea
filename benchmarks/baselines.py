"""Other ways to compress a KV cache, each re-implemented from its description, to compare with.

A scheme is a pair of functions that quantise keys or values and give them back as floats, with
the bits that storing them would take. ``FakeQuantCache`` attends with them as decoding would:
every query sees its own token as it came and older ones quantised, except those that the scheme
itself keeps as they came (a residual window).

Where a description leaves a choice, the one with the smaller error is taken. Scales are float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import numpy as np

from vllm_metal_tq import rotation
from vllm_metal_tq.integrations.mlx_lm import hook

SCALE_BITS = 16
KEPT_BITS = 16  # an element that is kept as it came, in bf16


@dataclass(frozen=True)
class Side:
    """How keys, or values, are stored.

    Attributes:
        quantise: ``(..., num_tokens, head_dim)`` to the same shape and dtype, quantised.
        bits: head_dim to the bits stored for an element, scales included, windows not.
        window: tokens kept as they came besides the query's own, at most.
        flush: whether the window empties at once when it is full, as KIVI's does for keys (it
            then holds half of ``window`` on average), or slides.
    """

    quantise: Callable[[mx.array], mx.array]
    bits: Callable[[int], float]
    window: int = 0
    flush: bool = False

    def as_it_came(self, query: mx.array, token: mx.array) -> mx.array:
        """Whether ``query`` (a position) sees ``token`` (an earlier one, or itself) unquantised."""
        if self.flush:
            return (token >= query // self.window * self.window) | (token == query)
        return query - token <= self.window


@dataclass(frozen=True)
class Scheme:
    """A way to compress a cache: whose it is, its widths for tables, and its two sides."""

    family: str
    widths: str
    keys: Side
    values: Side

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.family} {self.widths}"

    def bits(self, head_dim: int, context: int) -> float:
        """Bits of an element of K or V at a context of that many tokens, all overhead included."""
        return (
            _side_bits(self.keys, head_dim, context) + _side_bits(self.values, head_dim, context)
        ) / 2

    def caches(self, model: nn.Module) -> list:
        """A prompt cache for ``model``, whose layers must all be plain attention."""
        hook.install(model)
        return [FakeQuantCache(self) for _ in model.layers]


def _side_bits(side: Side, head_dim: int, context: int) -> float:
    kept = min((side.window / 2 if side.flush else side.window) / context, 1)
    return side.bits(head_dim) * (1 - kept) + KEPT_BITS * kept


class FakeQuantCache(host.ConcatenateKVCache):
    """A layer's keys and values, as they came and quantised.

    Chunks must be multiples of 32 tokens, but for the last one, where keys are quantised along
    the tokens (``per_channel``).
    """

    def __init__(self, scheme: Scheme):
        super().__init__()
        self.scheme = scheme
        self.quantised = host.ConcatenateKVCache()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store a chunk, ``(1, num_kv_heads, L, head_dim)`` each; return all as they came."""
        self.quantised.update_and_fetch(
            self.scheme.keys.quantise(keys), self.scheme.values.quantise(values)
        )
        return super().update_and_fetch(keys, values)

    def attend(self, queries, keys, values, scale, mask, sinks):
        """Attend as token-by-token decoding would; a mask other than the causal one is refused."""
        if sinks is not None or isinstance(mask, mx.array):
            raise ValueError("a FakeQuantCache attends causally, without sinks")
        length, total = queries.shape[2], keys.shape[2]
        query = mx.arange(total - length, total)[:, None]
        token = mx.arange(total)
        raw_key, raw_value = (
            side.as_it_came(query, token) for side in (self.scheme.keys, self.scheme.values)
        )
        groups = queries.shape[1] // keys.shape[1]
        queries = (queries * scale).reshape(1, keys.shape[1], groups, length, -1)
        logits = mx.where(raw_key, _scores(queries, keys), _scores(queries, self.quantised.keys))
        weights = mx.softmax(mx.where(token <= query, logits, -mx.inf), axis=-1, precise=True)
        output = mx.where(raw_value, weights, 0) @ values[:, :, None]
        output += mx.where(raw_value, 0, weights) @ self.quantised.values[:, :, None]
        return output.flatten(1, 2)


def _scores(queries: mx.array, keys: mx.array) -> mx.array:
    return queries @ keys[:, :, None].swapaxes(-1, -2)


# --- Codes ------------------------------------------------------------------------------------


def affine(x: mx.array, bits: int, group: int) -> mx.array:
    """Equidistant levels from the least to the largest of ``group`` elements of a head vector."""
    y = x.reshape(*x.shape[:-1], -1, min(group, x.shape[-1]))
    low, high = y.min(axis=-1, keepdims=True), y.max(axis=-1, keepdims=True)
    # float16 holds integers up to 2048 exactly: no zero point is larger.
    least = mx.maximum(mx.maximum(mx.abs(low), mx.abs(high)) / 2048, 1e-7)
    scale = _half(mx.maximum((high - low) / (2**bits - 1), least))
    zero = mx.round(low / scale)
    codes = mx.clip(mx.round(y / scale) - zero, 0, 2**bits - 1)
    return ((codes + zero) * scale).reshape(x.shape)


def mlx_affine(x: mx.array, bits: int, group: int) -> mx.array:
    """What mlx_lm's QuantizedKVCache stores, by the functions that it calls."""
    codes, *factors = mx.quantize(x, group_size=group, bits=bits)
    return mx.dequantize(codes, *map(_half, factors), group_size=group, bits=bits)


def per_channel(x: mx.array, bits: int, group: int = 32) -> mx.array:
    """``affine`` over ``group`` tokens of one channel, instead of channels of one token (KIVI)."""
    padding = -x.shape[-2] % group
    padded = mx.concatenate([x, mx.repeat(x[..., -1:, :], padding, axis=-2)], axis=-2)
    quantised = affine(padded.swapaxes(-1, -2), bits, group).swapaxes(-1, -2)
    return quantised[..., : x.shape[-2], :]


# Steps of the best uniform quantisers of N(0, 1), symmetric about 0 (Max, 1960, and by search).
BEST_STEPS = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}


def uniform(x: mx.array, bits: int) -> mx.array:
    """2^bits equidistant levels, symmetric about 0: the best step, or what reaches the largest."""
    half = (2**bits - 1) / 2
    rms = mx.sqrt((x * x).mean(axis=-1, keepdims=True))
    step = mx.minimum(rms * BEST_STEPS[bits], mx.abs(x).max(axis=-1, keepdims=True) / half)
    step = _half(mx.maximum(step, 1e-7))
    return mx.clip(mx.floor(x / step) + 0.5, -half, half) * step


def lloyd_max(x: mx.array, bits: int, group: int) -> mx.array:
    """Levels of the best quantiser of N(0, 1), times the RMS of ``group`` elements."""
    y = x.reshape(*x.shape[:-1], -1, min(group, x.shape[-1]))
    scale = _half(mx.maximum(mx.sqrt((y * y).mean(axis=-1, keepdims=True)), 1e-7))
    levels = mx.array(normal_levels(bits))
    edges = (levels[1:] + levels[:-1]) / 2
    codes = mx.zeros(y.shape, mx.uint8)
    for edge in edges.tolist():
        codes = codes + (y > edge * scale)
    return (levels[codes] * scale).reshape(x.shape)


def outliers(x: mx.array, bits: int, share: float) -> mx.array:
    """The loudest channels as they came; the others rotated at random, then ``uniform``.

    The loudest are found in the chunk itself, which no stored choice of channels could beat.
    """
    kept = round(share * x.shape[-1])
    order = mx.argsort(-(x * x).sum(axis=-2, keepdims=True), axis=-1)
    order = mx.broadcast_to(order, x.shape)
    sorted_x = mx.take_along_axis(x, order, axis=-1)
    basis = mx.array(_orthogonal(x.shape[-1] - kept))
    rest = uniform(sorted_x[..., kept:] @ basis, bits) @ basis.T
    loud = sorted_x[..., :kept].astype(mx.bfloat16).astype(x.dtype)
    return mx.take_along_axis(
        mx.concatenate([loud, rest], axis=-1), mx.argsort(order, axis=-1), axis=-1
    )


def qjl(x: mx.array, bits: int) -> mx.array:
    """TurboQuant's second algorithm (arXiv:2504.19874): one of the bits sketches the residual."""
    dim = x.shape[-1]
    z = lloyd_max(x, bits - 1, dim) if bits > 1 else mx.zeros_like(x)
    residual = x - z
    sketch = mx.array(np.random.default_rng(7).standard_normal((dim, dim)).astype(np.float32))
    signs = mx.where(residual @ sketch.T >= 0, 1.0, -1.0)
    length = _half(mx.linalg.norm(residual, axis=-1, keepdims=True))
    return z + (np.pi / 2) ** 0.5 / dim * length * (signs @ sketch)


def rotated(quantise: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """``quantise`` after a randomised Hadamard transform, rotated back."""
    return lambda x: rotation.unrotate(quantise(rotation.rotate(x)), x.shape[-1]).astype(x.dtype)


def _half(x: mx.array) -> mx.array:
    return x.astype(mx.float16).astype(x.dtype)


@lru_cache
def _orthogonal(dim: int) -> np.ndarray:
    """A fixed random orthogonal matrix, float32 ``(dim, dim)``."""
    basis = np.linalg.qr(np.random.default_rng(11).standard_normal((dim, dim)))[0]
    return basis.astype(np.float32)


@lru_cache
def normal_levels(bits: int) -> np.ndarray:
    """Lloyd-Max levels of N(0, 1), float32 ascending, by Lloyd's iteration on a fine grid."""
    grid = np.linspace(-7, 7, 280_001)
    mass = np.exp(-grid * grid / 2)
    # Panter and Dite: the density of levels goes with the cube root of the distribution's.
    share = np.cumsum(np.cbrt(mass))
    levels = np.interp((np.arange(2**bits) + 0.5) / 2**bits, share / share[-1], grid)
    total, first = (np.concatenate([[0], np.cumsum(y)]) for y in (mass, mass * grid))
    for _ in range(2000):
        edges = np.searchsorted(grid, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(grid)]])
        new = np.diff(first[edges]) / np.diff(total[edges])
        if np.abs(new - levels).max() < 1e-9:
            break
        levels = new
    return levels.astype(np.float32)


# --- Schemes ----------------------------------------------------------------------------------


def _side(quantise, bits: int, overhead: float, **window) -> Side:
    """A side whose overhead in bits is per head vector."""
    return Side(quantise, lambda head_dim: bits + overhead / head_dim, **window)


def _grouped(quantise, bits: int, group: int, numbers: int, **window) -> Side:
    """A side with so many float16 numbers for a group of elements."""
    return Side(quantise, lambda dim: bits + numbers * SCALE_BITS / min(group, dim), **window)


def vllm_metal(k_bits: int, v_bits: int) -> Scheme:
    """vllm-metal's TurboQuant: affine keys that are not rotated, rotated Lloyd-Max values.

    Both in groups of 32 elements: keys with scale and zero point, values with their RMS. Its
    documentation speaks of rotated keys; its code does not rotate them.
    """
    return Scheme(
        "vllm-metal",
        f"q{k_bits}_0/q{v_bits}_0",
        _grouped(lambda x: affine(x, k_bits, 32), k_bits, 32, 2),
        _grouped(rotated(lambda x: lloyd_max(x, v_bits, 32)), v_bits, 32, 1),
    )


def mlx_lm(k_bits: int, v_bits: int, group: int = 64) -> Scheme:
    """mlx_lm's QuantizedKVCache: affine in groups of 64, a scale and a bias each."""
    return Scheme(
        "mlx_lm affine",
        f"{k_bits}/{v_bits}",
        _grouped(lambda x: mlx_affine(x, k_bits, group), k_bits, group, 2),
        _grouped(lambda x: mlx_affine(x, v_bits, group), v_bits, group, 2),
    )


def hadamard(k_bits: int, v_bits: int) -> Scheme:
    """A Hadamard transform and uniform codes, one scale for a head vector."""
    return Scheme(
        "Hadamard uniform",
        f"{k_bits}/{v_bits}",
        _side(rotated(lambda x: uniform(x, k_bits)), k_bits, SCALE_BITS),
        _side(rotated(lambda x: uniform(x, v_bits)), v_bits, SCALE_BITS),
    )


def kivi(k_bits: int, v_bits: int, window: int = 128) -> Scheme:
    """KIVI (arXiv:2402.02750): keys per channel, values per token, groups of 32, and a residual.

    The window of keys is quantised as a whole when it is full, that of values slides.
    """
    return Scheme(
        f"KIVI R={window}",
        f"{k_bits}/{v_bits}",
        _grouped(lambda x: per_channel(x, k_bits), k_bits, 32, 2, window=window, flush=True),
        _grouped(lambda x: affine(x, v_bits, 32), v_bits, 32, 2, window=window),
    )


def outlier_channels(k_bits: int, v_bits: int, share: float = 19 / 128) -> Scheme:
    """The loudest 19 of 128 channels of keys in bf16; values as in ``hadamard``."""

    def key_bits(head_dim: int) -> float:
        kept = round(share * head_dim)
        return (kept * KEPT_BITS + (head_dim - kept) * k_bits + SCALE_BITS) / head_dim

    values = _side(rotated(lambda x: uniform(x, v_bits)), v_bits, SCALE_BITS)
    keys = Side(lambda x: outliers(x, k_bits, share), key_bits)
    return Scheme("outlier channels", f"{k_bits}/{v_bits}", keys, values)


def turboquant_qjl(k_bits: int, v_bits: int) -> Scheme:
    """TurboQuant as in its paper: QJL keys, Lloyd-Max values, one or two scales a head vector."""

    def quantise_values(x: mx.array) -> mx.array:
        return lloyd_max(x, v_bits, x.shape[-1])

    return Scheme(
        "QJL",
        f"{k_bits - 1}+1/{v_bits}",
        _side(rotated(lambda x: qjl(x, k_bits)), k_bits, 2 * SCALE_BITS),
        _side(rotated(quantise_values), v_bits, SCALE_BITS),
    )


TAIL_MARK = " + tail"


def with_tail(scheme: Scheme, tokens: int = 32) -> Scheme:
    """``scheme`` with as many recent tokens kept as they came."""
    keys, values = (replace(side, window=tokens) for side in (scheme.keys, scheme.values))
    return Scheme(f"{scheme.family}{TAIL_MARK} {tokens}", scheme.widths, keys, values)


_SAME = tuple((bits, bits) for bits in (2, 3, 4, 5, 6, 8))

SCHEMES: tuple[Scheme, ...] = (
    *(vllm_metal(k, v) for k, v in (*_SAME, (3, 2), (4, 2), (4, 3), (5, 4), (8, 3), (8, 4))),
    *(mlx_lm(k, v) for k, v in (*_SAME, (3, 2), (4, 2), (4, 3), (8, 4))),
    *(hadamard(k, v) for k, v in (*_SAME, (3, 2), (4, 2), (4, 3), (5, 4), (6, 5), (8, 6))),
    *(kivi(k, v, 128) for k, v in ((2, 2), (3, 3), (4, 4), (6, 6))),
    *(kivi(k, v, 32) for k, v in ((2, 2), (3, 3), (4, 4), (6, 6))),
    *(outlier_channels(k, v) for k, v in ((2, 2), (3, 3), (4, 4), (6, 6), (2, 4))),
    *(turboquant_qjl(k, v) for k, v in ((2, 2), (3, 3), (4, 4), (6, 6), (8, 8))),
)
"""Every scheme at its usual widths and beyond them, from about 2.5 to 9 bits."""

WITH_TAIL: tuple[Scheme, ...] = (
    *(with_tail(vllm_metal(k, v)) for k, v in ((4, 4), (8, 3))),
    *(with_tail(mlx_lm(k, v)) for k, v in ((4, 4), (3, 3), (8, 4))),
    *(with_tail(hadamard(k, v)) for k, v in ((2, 2), (3, 3), (4, 4), (6, 5))),
    with_tail(turboquant_qjl(4, 4)),
)
"""Some of them with the tail that ours has: what centring and codes are worth without it."""
