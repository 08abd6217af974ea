"""The last tokens of a sequence as they came: a ring beside the pages.

Pages always hold every token, so the ring may be dropped at any time: nothing stored is lost.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

TAIL = 32  # tokens


class Tail:
    """A ring of keys and values; the token of sequence index i lies in slot i mod ``TAIL``.

    Attributes:
        arrays: keys and values, ``(num_kv_heads, TAIL, head_dim)`` each in the model's dtype,
            or None while there are none.
        length: how many of the sequence's last tokens the ring holds.
    """

    def __init__(self):
        self.arrays: tuple[mx.array, mx.array] | None = None
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.arrays) if self.arrays else 0

    def push(self, keys: mx.array, values: mx.array, start: int) -> None:
        """Take up new tokens, ``(num_kv_heads, L, head_dim)``, from sequence index ``start``."""
        new = keys, values
        self.prepare(*new)
        source = sources(start, keys.shape[1])
        self.hold(tuple(map(pushed, self.arrays, new, [source] * 2)), keys.shape[1])

    def prepare(self, keys: mx.array, values: mx.array) -> None:
        """Allocate arrays that fit new tokens, where there are none."""
        if self.arrays is None:
            shape = (keys.shape[0], TAIL, keys.shape[2])
            self.arrays = mx.zeros(shape, keys.dtype), mx.zeros(shape, values.dtype)

    def hold(self, arrays: tuple[mx.array, mx.array], new: int) -> None:
        """Take over arrays to which ``new`` tokens were added."""
        self.arrays, self.length = arrays, min(self.length + new, TAIL)

    def ordered(self, num_tokens: int) -> tuple[mx.array, ...]:
        """Keys and values of the last ``length`` of ``num_tokens`` tokens, oldest first."""
        slots = mx.array(np.arange(num_tokens - self.length, num_tokens, dtype=np.uint32) % TAIL)
        return tuple(mx.take(x, slots, axis=1) for x in self.arrays or ())

    def trim(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self.length = max(self.length - count, 0)

    def shift(self, count: int, remaining: int) -> None:
        """Older tokens were dropped from the sequence.

        Args:
            count: how many, by which the index of every later token falls.
            remaining: how many tokens come after the gap.
        """
        self.length = min(self.length, remaining)
        if self.arrays and count % TAIL:
            self.arrays = tuple(mx.roll(x, -count, axis=1) for x in self.arrays)


def pushed(ring: mx.array, new: mx.array, source: mx.array) -> mx.array:
    """A ring ``(num_kv_heads, TAIL, head_dim)`` with the last of some new tokens in their slots."""
    new = new[:, max(new.shape[1] - TAIL, 0) :]
    return mx.take(mx.concatenate([ring, new.astype(ring.dtype)], axis=1), source, axis=1)


@lru_cache(maxsize=64)
def sources(start: int, length: int) -> mx.array:
    """Which of the old slots, then the new tokens, goes to each slot: uint32 ``(TAIL,)``."""
    last = min(length, TAIL)
    source = np.arange(TAIL, dtype=np.uint32)
    source[np.arange(start + length - last, start + length) % TAIL] = TAIL + np.arange(last)
    return mx.array(source)
