"""The last tokens of a sequence as they came: a ring beside the pages.

Pages always hold every token, so the ring may be dropped at any time: nothing stored is lost.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

TAIL = 32  # tokens


class Tail:
    """A ring of keys and values; the token of sequence index i lies in slot i mod ``TAIL``.

    Attributes:
        arrays: keys and values, ``(B, num_kv_heads, TAIL, head_dim)`` each in the model's dtype,
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
        """Take up new tokens, ``(B, num_kv_heads, L, head_dim)``, from sequence index ``start``."""
        shape, length = (*keys.shape[:2], TAIL, keys.shape[3]), keys.shape[2]
        old = self.arrays or (mx.zeros(shape, keys.dtype), mx.zeros(shape, values.dtype))
        last = min(length, TAIL)
        # Which of the old slots, then the new tokens, goes to each slot.
        source = np.arange(TAIL, dtype=np.uint32)
        source[np.arange(start + length - last, start + length) % TAIL] = TAIL + np.arange(last)
        source = mx.array(source)
        self.arrays = tuple(
            mx.take(mx.concatenate([ring, new[:, :, length - last :]], axis=2), source, axis=2)
            for ring, new in zip(old, (keys, values), strict=True)
        )
        self.length = min(self.length + length, TAIL)

    def ordered(self, num_tokens: int) -> tuple[mx.array, ...]:
        """Keys and values of the last ``length`` of ``num_tokens`` tokens, oldest first."""
        slots = mx.array(np.arange(num_tokens - self.length, num_tokens, dtype=np.uint32) % TAIL)
        return tuple(mx.take(x, slots, axis=2) for x in self.arrays or ())

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
            self.arrays = tuple(mx.roll(x, -count, axis=2) for x in self.arrays)
