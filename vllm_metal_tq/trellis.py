"""Trellis codes of 2 and 3 bits: an element's level depends on the bits of those before it.

Of an element's code one bit, c, passes through a shift register; the others, u, do not (Ungerboeck
1982; as a source code Marcellin and Fischer 1990). Three parities of c and of the six c's before it
choose one of eight sets of levels, and u a level of the set. A vector is a ring: before its first
element comes its last (tail-biting), so that nothing but the codes is stored.

The parities of a plane of bits are exclusive ors of the plane, shifted. They and u are the planes
of an ordinary code, of two more bits: a decoder needs neither a table nor a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_, xor

import mlx.core as mx
import numpy as np

from .codebook import TRELLIS_LEVELS, Octic
from .config import T2, T3
from .layout import PLANE_BITS, Array

MEMORY = 6  # c's before an element that its level depends on
STATES = 1 << MEMORY
PARITIES = 3
SETS = 1 << PARITIES
WARM = 30  # elements on either side of the seam from which its state is guessed; kernels take sixes
SLICE = 512  # vectors coded at a time: what is made of them stays in the processor's cache

MASKS = {T2: (20, 34, 117), T3: (28, 54, 73)}
"""Width -> of each parity which c's it takes: bit i that of the element i before.

tools/train_trellis.py measures them, and says where they come from.
"""


def kernel_planes(width: int) -> tuple[int, int, int]:
    """What kernels are told of a width: bits of its first plane and of all others, and taps.

    Taps are ``MASKS``, 7 bits each; 0 of a scalar width.
    """
    low, *high = PLANE_BITS[width]
    taps = sum(mask << (MEMORY + 1) * j for j, mask in enumerate(MASKS.get(width, ())))
    return low, sum(high), taps


def unfold(planes: list[Array], width: int) -> list[Array]:
    """Planes of the numbers of levels, from those of codes: uint8 ``(..., dim / 8)`` each."""
    c, *u = planes
    roll = np.roll if isinstance(c, np.ndarray) else mx.roll
    before = roll(c, 1, -1)
    delayed = [c] + [c << i | before >> (8 - i) for i in range(1, MEMORY + 1)]
    for mask in reversed(MASKS[width]):
        u = [reduce(xor, (plane for i, plane in enumerate(delayed) if mask >> i & 1)), *u]
    return u


@dataclass(frozen=True)
class Trellis:
    """The encoder of a trellis code: Viterbi's algorithm, in NumPy.

    Attributes:
        masks: as in ``MASKS``.
        codebook: the levels.
    """

    masks: tuple[int, ...]
    codebook: Octic

    def nearest(self, y: mx.array, gain: float) -> tuple[mx.array, mx.array]:
        """Codes of y, c + 2 u, at the step that is y's root mean square, and this step times gain.

        Args:
            y: float32 ``(..., dim)``.
            gain: factor of the scale.

        Returns:
            uint8 codes ``(..., dim)`` and fp16 scales ``(...)``.
        """
        step = mx.sqrt(mx.square(y).mean(axis=-1, keepdims=True))
        # What has no step gets some codes: its scale says that it is zero, or cannot be encoded.
        x = mx.where((step > 0) & mx.isfinite(step), y / step, 0)
        columns = np.ascontiguousarray(np.asarray(x).reshape(-1, y.shape[-1]).T)
        codes = np.empty(columns.shape, np.uint8)
        for i in range(0, columns.shape[1], SLICE):
            codes[:, i : i + SLICE] = self.codes(columns[:, i : i + SLICE])
        return mx.array(codes.T).reshape(y.shape), (step[..., 0] * gain).astype(mx.float16)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Codes uint8 ``(dim, n)``, c + 2 u, whose levels are close to x, float32 ``(dim, n)``.

        Viterbi's algorithm (Viterbi 1967) twice: over the elements around the seam, from any state
        to any, which guesses the state at the seam; then around the ring, from there to there.
        """
        warm = min(WARM, len(x))
        around_seam = np.arange(-warm, warm) % len(x)
        return self.around(x, _states(self._costs(x[around_seam]), self._branches)[warm - 1])

    def around(self, x: np.ndarray, seam: np.ndarray) -> np.ndarray:
        """The same around the ring, from states ``seam``, int ``(n,)``, to them."""
        c = _states(self._costs(x), self._branches, seam).astype(np.uint8) & 1
        # Of the set that c chose, the nearest level.
        u = np.abs(x - self._levels[:, self._sets[_register(c)]]).argmin(axis=0).astype(np.uint8)
        codes: np.ndarray = c | u << 1
        return codes

    def _costs(self, x: np.ndarray) -> np.ndarray:
        """Square errors of the nearest levels of each set: ``(dim, SETS, n)``."""
        return reduce(np.minimum, (np.square(x[:, None] - u[:, None]) for u in self._levels))

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Numbers of the levels that codes, uint8 ``(dim, n)``, stand for: the same shape."""
        numbers: np.ndarray = self._sets[_register(codes & 1)] | codes >> 1 << PARITIES
        return numbers

    @cached_property
    def _levels(self) -> np.ndarray:
        """Levels float32 ``(u, set)``."""
        numbers = mx.arange(1 << self.codebook.bits, dtype=mx.uint8)
        return np.array(self.codebook.levels(numbers)).reshape(-1, SETS)

    @cached_property
    def _sets(self) -> np.ndarray:
        """The set that c's choose: bit i of the index is the c of the element i before."""
        register = range(2 * STATES)
        parities = [[(seen & mask).bit_count() & 1 for seen in register] for mask in self.masks]
        return reduce(or_, (np.array(bits, np.uint8) << j for j, bits in enumerate(parities)))

    @property
    def _branches(self) -> np.ndarray:
        """``(2, STATES)``: the sets that lead to each state, where 0 and where 1 leaves."""
        return self._sets.reshape(2, STATES)


def _register(c: np.ndarray) -> np.ndarray:
    """Of each element its own c, uint8 ``(dim, n)``, in bit 0, and in bit i that i before."""
    return reduce(or_, (np.roll(c, i, axis=0) << i for i in range(MEMORY + 1)))


def _states(costs: np.ndarray, branches: np.ndarray, ring: np.ndarray | None = None) -> np.ndarray:
    """The cheapest path's states after each element ``(length, n)``.

    State s is the last six c's, the last in bit 0; before it was s >> 1, or that and bit 5.

    Args:
        costs: of the sets, float32 ``(length, SETS, n)``.
        branches: the sets of the two branches to each state, ``(2, STATES)``.
        ring: the state ``(n,)`` in which paths begin and end, or None: in any.
    """
    length, _, n = costs.shape
    everyone = np.arange(n)
    total = np.zeros((STATES, n), np.float32)
    if ring is not None:
        total += np.float32(np.finfo(np.float32).max / 2)
        total[ring, everyone] = 0
    stay, leave = np.empty((2, STATES, n), np.float32)
    halves = total.reshape(2, -1, 1, n)  # of them 0 and 1 leaves the register
    left = np.empty((length, STATES, n), bool)
    for t in range(length):
        for out, sets, before in zip((stay, leave), branches, halves, strict=True):
            np.take(costs[t], sets, axis=0, out=out, mode="clip")
            out.reshape(-1, 2, n)[:] += before
        np.less(leave, stay, out=left[t])
        np.minimum(leave, stay, out=total)
    state = total.argmin(axis=0) if ring is None else ring
    states = np.empty((length, n), np.intp)
    for t in reversed(range(length)):
        states[t] = state
        state = state >> 1 | left[t, state, everyone].astype(np.intp) << (MEMORY - 1)
    return states


TRELLISES = {width: Trellis(masks, TRELLIS_LEVELS[width]) for width, masks in MASKS.items()}
"""Trellis width -> its encoder."""
