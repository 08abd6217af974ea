"""The last tokens of sequences as they came: a ring beside the pages.

Pages always hold every token, so the ring may be dropped at any time: nothing stored is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

TAIL = 32  # tokens
FEW = 8  # tokens of a chunk that decoding kernels take, and that can be trimmed without a loss

Rings = tuple[mx.array, mx.array]
"""Keys and values, ``(B, num_kv_heads, TAIL, head_dim)`` each."""


class Tail:
    """Rings of keys and values, one a sequence; the token of index i lies in slot i mod ``TAIL``.

    Attributes:
        arrays: keys and values, ``(B, num_kv_heads, TAIL, head_dim)`` each in the model's dtype,
            or None while there are none.
        lengths: how many of each sequence's last tokens its ring holds.
    """

    def __init__(self, count: int = 1):
        self.arrays: Rings | None = None
        self.lengths = [0] * count
        self._undo: tuple[Rings, list[int], int] | None = None  # what it was, how many came then

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.arrays) if self.arrays else 0

    def push(self, keys: mx.array, values: mx.array, starts: Sequence[int]) -> None:
        """Take up new tokens, ``(B, num_kv_heads, L, head_dim)``, from these sequence indices."""
        old_keys, old_values = self.prepare(keys, values)
        source = sources(tuple(starts), keys.shape[2])
        rings = pushed(old_keys, keys, source), pushed(old_values, values, source)
        self.hold(rings, keys.shape[2])

    def prepare(self, keys: mx.array, values: mx.array) -> Rings:
        """The arrays; where there are none, such as fit new tokens are allocated."""
        if self.arrays is None:
            shape = (*keys.shape[:2], TAIL, keys.shape[3])
            self.arrays = mx.zeros(shape, keys.dtype), mx.zeros(shape, values.dtype)
        return self.arrays

    def hold(self, arrays: Rings, new: int) -> None:
        """Take over arrays to which ``new`` tokens of each sequence were added."""
        # Of a few tokens some may be trimmed soon: drafts that the model refuses.
        self._undo = (self.arrays, self.lengths, new) if self.arrays and 1 < new <= FEW else None
        self.arrays, self.lengths = arrays, [min(n + new, TAIL) for n in self.lengths]

    def ordered(self, which: int, num_tokens: int) -> tuple[mx.array, ...]:
        """Keys and values of the last of ``num_tokens`` tokens of a sequence, oldest first.

        Returns:
            Two arrays ``(num_kv_heads, lengths[which], head_dim)``, or none.
        """
        first = num_tokens - self.lengths[which]
        slots = mx.array(np.arange(first, num_tokens, dtype=np.uint32) % TAIL)
        return tuple(mx.take(x[which], slots, axis=1) for x in self.arrays or ())

    def trim(self, count: int, ends: Sequence[int]) -> None:
        """Forget the last ``count`` tokens of sequences that had ``ends`` tokens.

        Where those belong to the last chunk and it was of at most ``FEW`` tokens, what they took
        the place of comes back.
        """
        if self._undo and self.arrays and count <= self._undo[2]:
            earlier, lengths, new = self._undo
            ages = (np.array(ends)[:, None] - 1 - np.arange(TAIL)) % TAIL  # of the slots' tokens
            gone = mx.array(ages < count)[:, None, :, None]
            keys, values = (
                mx.where(gone, old, now) for old, now in zip(earlier, self.arrays, strict=True)
            )
            self.arrays = keys, values
            self._undo = earlier, lengths, new - count
            self.lengths = [min(n + new - count, TAIL) for n in lengths]
        else:
            self._undo = None
            self.lengths = [max(n - count, 0) for n in self.lengths]

    def settle(self) -> None:
        """Nothing will be trimmed: what that would bring back is dropped."""
        self._undo = None

    def shift(self, which: int, count: int, remaining: int) -> None:
        """Older tokens were dropped from a sequence.

        Args:
            which: the sequence.
            count: how many, by which the index of every later token falls.
            remaining: how many tokens come after the gap.
        """
        self._undo = None
        self.lengths[which] = min(self.lengths[which], remaining)
        if self.arrays and count % TAIL:
            keys, values = (
                mx.concatenate([x[:which], mx.roll(x[which], -count, 1)[None], x[which + 1 :]])
                for x in self.arrays
            )
            self.arrays = keys, values

    def take(self, which: Sequence[int]) -> Tail:
        """The rings of some sequences."""
        tail = Tail()
        tail.lengths = [self.lengths[i] for i in which]
        if self.arrays:
            rows = mx.array(list(which), mx.int32)
            tail.arrays = _rows(self.arrays, rows)
            if self._undo:
                arrays, lengths, new = self._undo
                tail._undo = _rows(arrays, rows), [lengths[i] for i in which], new
        return tail

    @staticmethod
    def joined(tails: Sequence[Tail]) -> Tail:
        """The rings of all sequences of ``tails``."""
        tail = Tail()
        tail.lengths = [n for other in tails for n in other.lengths]
        full = [other.arrays for other in tails if other.arrays]
        if full:
            keys, values = (
                mx.concatenate(
                    [
                        mx.zeros((len(other.lengths), *like.shape[1:]), like.dtype)
                        if other.arrays is None
                        else other.arrays[i]
                        for other in tails
                    ]
                )
                for i, like in enumerate(full[0])
            )
            tail.arrays = keys, values
        return tail


def _rows(rings: Rings, which: mx.array) -> Rings:
    """The rings of some sequences."""
    keys, values = rings
    return keys[which], values[which]


def pushed(ring: mx.array, new: mx.array, source: mx.array) -> mx.array:
    """Rings ``(B, num_kv_heads, TAIL, head_dim)`` with the last of new tokens in their slots."""
    new = new[:, :, max(new.shape[2] - TAIL, 0) :]
    both = mx.concatenate([ring, new.astype(ring.dtype)], axis=2)
    return mx.take_along_axis(both, source[:, None, :, None], axis=2)


@lru_cache(maxsize=64)
def sources(starts: tuple[int, ...], length: int) -> mx.array:
    """Which of the old slots, then the new tokens, goes to each slot: uint32 ``(B, TAIL)``."""
    last = min(length, TAIL)
    source = np.tile(np.arange(TAIL, dtype=np.uint32), (len(starts), 1))
    for row, start in zip(source, starts, strict=True):
        row[np.arange(start + length - last, start + length) % TAIL] = TAIL + np.arange(last)
    return mx.array(source)
