"""What calibration knows of one layer: where its keys and values lie, and in which directions.

Keys are mostly a constant per KV head that the rotary embedding (RoPE) turns with the position:
the mean mu of the keys before RoPE. Subtracting the turned mean R_j mu leaves a short vector for
the codes. R_j is *defined* by integer phases, so that encoder and decoder agree at any position:
pair c turns by phi_c(j) = 2 pi ((j * step_c) mod 2^32) / 2^32. Where the model's own RoPE differs,
the difference is small and stays in the codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

TURN = 2**32  # integer phases of a full turn
TWO_PI = 2 * math.pi


@dataclass(frozen=True, eq=False)
class Centre:
    """Calibration of one layer. Two are equal only if they are the same object.

    A stored key is ``t * (k_j - f * R_j mu)``, a stored value ``v - g * m``, with a flag f or g of
    a token that is 1 where this makes the vector shorter. Queries are divided by t.

    Attributes:
        pairs: uint32 ``(head_dim // 2, 3)``: first element, second element and step of each pair
            that RoPE turns. Every element is in one pair; the step is 0 where RoPE does nothing.
        mu: float32 ``(num_kv_heads, head_dim)``, mean key before RoPE, times RoPE's amplitude.
        smoothing: float32 ``(num_kv_heads, head_dim)``, t > 0, equal within a pair.
        value_mean: float32 ``(num_kv_heads, head_dim)``, m.
    """

    pairs: np.ndarray
    mu: mx.array
    smoothing: mx.array
    value_mean: mx.array

    def __deepcopy__(self, memo: object) -> Centre:
        return self  # nothing in it changes, and identity is its hash

    def at(self, positions: mx.array) -> mx.array:
        """R_j mu, the oracle.

        Args:
            positions: int32 ``(n,)``.

        Returns:
            float32 ``(num_kv_heads, n, head_dim)``.
        """
        return turn(self.mu[:, None], positions, self.pairs)

    def unsmooth(self, queries: mx.array) -> mx.array:
        """Queries ``(..., num_heads, L, head_dim)`` divided by their KV head's t."""
        group = queries.shape[-3] // self.smoothing.shape[0]
        return queries / mx.repeat(self.smoothing, group, axis=0)[:, None]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What ``from_arrays`` takes: pairs, mu, smoothing, value_mean."""
        return mx.array(self.pairs), self.mu, self.smoothing, self.value_mean

    @classmethod
    def from_arrays(cls, arrays: Sequence[mx.array], num_kv_heads: int, head_dim: int) -> Centre:
        """Rebuild a centre from ``arrays``.

        Raises:
            ValueError: they are not the centre of such a layer.
        """
        pairs, *rest = arrays
        elements = np.array(pairs)[:, :2].ravel() if pairs.ndim == 2 else np.zeros(0)
        fits = (
            pairs.dtype == mx.uint32
            and pairs.shape == (head_dim // 2, 3)
            and np.array_equal(np.sort(elements), np.arange(head_dim))
            and all(x.dtype == mx.float32 and x.shape == (num_kv_heads, head_dim) for x in rest)
            and all(mx.isfinite(x).all().item() for x in rest)
            and (rest[1] > 0).all().item()
        )
        if not fits:
            raise ValueError(
                f"no centre of {num_kv_heads} KV heads with {head_dim} elements: shapes "
                f"{[x.shape for x in arrays]}, or values out of range"
            )
        return cls(np.array(pairs), *rest)

    @cached_property
    def without_mu(self) -> Centre:
        """The same with mu = 0: no token that it encodes gets a flag f."""
        return replace(self, mu=mx.zeros_like(self.mu))


def turn(x: mx.array, positions: mx.array, pairs: np.ndarray, inverse: bool = False) -> mx.array:
    """R_j x, or R_j^-1 x, for the position j of each token.

    Args:
        x: float32 ``(..., n, head_dim)``, or one token in place of n.
        positions: int32 ``(n,)``.
        pairs: as ``Centre.pairs``.
        inverse: turn back.

    Returns:
        float32 ``(..., n, head_dim)``.
    """
    order, back, steps = _tables(pairs.tobytes())
    angles = phases(positions, steps)
    cos, sin = mx.cos(angles), mx.sin(angles)
    if inverse:
        sin = -sin
    first, second = mx.split(x[..., order], 2, axis=-1)
    turned = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned[..., back]


def phases(positions: mx.array, steps: mx.array) -> mx.array:
    """Angles in radians: float32 ``(n, pairs)`` in [-pi, pi].

    Args:
        positions: int32 ``(n,)``.
        steps: uint32 ``(pairs,)``.
    """
    whole = positions.astype(mx.uint32)[:, None] * steps  # wraps, which drops full turns
    return whole.view(mx.int32).astype(mx.float32) * (TWO_PI / TURN)


@lru_cache
def _tables(pairs: bytes) -> tuple[mx.array, mx.array, mx.array]:
    """Elements with all first ones before all second ones, the inverse of that order, steps."""
    columns = np.frombuffer(pairs, np.uint32).reshape(-1, 3)
    order = np.concatenate([columns[:, 0], columns[:, 1]])
    return mx.array(order), mx.array(np.argsort(order).astype(np.uint32)), mx.array(columns[:, 2])


def alike(a: Centre | None, b: Centre | None) -> bool:
    """Whether two centres say the same: they may come from different files."""
    if a is b or a is None or b is None:
        return a is b
    arrays = zip(a.arrays, b.arrays, strict=True)
    return all(mx.array_equal(x, y).item() for x, y in arrays)
