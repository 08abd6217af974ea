"""Codebooks: from a number to the nearest code, and from a code to its level.

Keys take uniform levels, values levels close to Lloyd-Max's for a normal distribution, trellis
codes levels of their own. All are formulas, so that a GPU kernel needs no table, and all are
stated here alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import mlx.core as mx
import numpy as np
from numpy.polynomial import Polynomial

from .config import T2, T3

Number = TypeVar("Number", float, mx.array, np.ndarray)

_GAUSSIAN_COEFFICIENTS = {
    2: (1.78577, 0.40554, 0.0),
    3: (1.88582, 0.74143, 0.0),
    4: (1.92406, 1.07394, 0.0),
    5: (2.03734, 0.91050, 0.78659),
    6: (2.06941, 0.94217, 1.04815),
    8: (2.11686, 0.94955, 1.53982),
}
"""Bits -> (a, b, c) of w*(a + b*w^2 + c*w^16), fitted by benchmarks/fit_codebook.py."""

CELL_TERMS = {2: 1, 3: 3, 4: 5, 5: 7, 6: 9, 8: 13}
"""Bits -> terms of the polynomial that gives a number's cell."""


@dataclass(frozen=True)
class Uniform:
    """Mid-rise uniform levels -(n-1)/2 ... (n-1)/2 in steps of 1, n = 2^bits."""

    bits: int

    def codes(self, x: mx.array) -> mx.array:
        """Nearest codes of ``x`` (any shape, float32) as uint8; the ends clip."""
        half = 1 << (self.bits - 1)
        return mx.clip(mx.floor(x) + half, 0, 2 * half - 1).astype(mx.uint8)

    def levels(self, codes: mx.array) -> mx.array:
        """Levels of uint8 ``codes``, float32, same shape."""
        return codes.astype(mx.float32) - ((1 << self.bits) - 1) / 2


@dataclass(frozen=True)
class Gaussian:
    """Levels b*w*(a/b + w^2 + c/b*w^16) at w = (2*code + 1 - n)/n, n = 2^bits.

    A closed form of Lloyd-Max's quantiser for N(0, 1) (Lloyd 1982, Max 1960). Its mean square
    error is above the optimum's by 0 % at 2 bits, 0.2 % at 3, 2.0 % at 4, 0.3 % at 5 and 6, and
    1.4 % at 8. Up to 4 bits c is 0, which saves a kernel five multiplications. All but the
    factor b is rounded as half-float arithmetic does, because that is how kernels compute it:
    a level is the same number everywhere.
    """

    bits: int

    def codes(self, x: mx.array) -> mx.array:
        """Nearest codes of ``x`` (any shape, float32) as uint8.

        Cells meet where ``cell_polynomial`` gives whole numbers, because that is how kernels find
        them: within 1 % of a cell of the middle between two levels (4 % at 8 bits).
        """
        size, half = mx.abs(x), 1 << (self.bits - 1)
        outwards = mx.zeros(x.shape, mx.uint8)
        for boundary in self._positive_boundaries:
            outwards = outwards + (size > boundary)
        return mx.where(x > 0, half + outwards, half - 1 - outwards)

    def levels(self, codes: mx.array) -> mx.array:
        """Levels of uint8 ``codes``, float32, same shape."""
        n = 1 << self.bits
        return self._level((2 * codes.astype(mx.float32) + (1 - n)) * (1 / n))

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """b, and a/b and c/b in half precision."""
        a, b, c = _GAUSSIAN_COEFFICIENTS[self.bits]
        return b, float(np.float16(a / b)), float(np.float16(c / b))

    @property
    def largest(self) -> float:
        """The last level."""
        return float(self._level(1 - 1 / 2**self.bits))

    def _level(self, w: Number) -> Number:
        b, a_by_b, c_by_b = self.coefficients
        factor = _half(w * w + a_by_b)
        if c_by_b:
            eighth = _half(w * w)
            for _ in range(2):
                eighth = _half(eighth * eighth)
            factor = _half(_half(eighth * c_by_b) * eighth + factor)
        level: Number = _half(w * factor) * b
        return level

    @cached_property
    def _positive_boundaries(self) -> list[float]:
        cells, centre = Polynomial(self.cell_polynomial(CELL_TERMS[self.bits])), self.cell_centre
        x = self._middles
        whole = np.arange(1, len(x) + 1)
        for _ in range(5):  # Newton's
            s = x * x - centre
            x = x - (x * cells(s) - whole) / (cells(s) + 2 * x * x * cells.deriv()(s))
        return list(map(float, x))

    @cached_property
    def _middles(self) -> np.ndarray:
        """The middles between positive levels, float64."""
        n = 1 << self.bits
        levels = self._level(np.arange(1, n, 2, dtype=np.float32) / n).astype(np.float64)
        middles: np.ndarray = (levels[1:] + levels[:-1]) / 2
        return middles

    @property
    def cell_centre(self) -> float:
        """The middle of the squares that ``cell_polynomial`` is for."""
        return float(self._middles[-1] ** 2 / 2)

    def cell_polynomial(self, terms: int, step: float = 1.0) -> list[float]:
        """Coefficients of P, for which the cell of x in these steps is floor(|x| P(x^2 - centre)).

        ``centre`` is ``cell_centre``: powers of squares about it are precise in float32. An odd
        number of terms is right beyond the last boundary too.
        """
        x = self._middles * step
        powers = x[:, None] * (x[:, None] ** 2 - self.cell_centre) ** np.arange(terms)
        size = np.abs(powers).max(axis=0)  # makes it well conditioned
        fit, *_ = np.linalg.lstsq(powers / size, np.arange(1, len(x) + 1), rcond=None)
        return list(map(float, fit / size))


@dataclass(frozen=True)
class Octic:
    """Levels b*w*(a/b + w^8) at w = (2*code + 1 - n)/n, n = 2^bits: those of trellis codes.

    Rounded as those of ``Gaussian``. tools/train_trellis.py finds a and b.

    Attributes:
        bits: of the number of a level, two more than a code has.
        a: the first coefficient.
        b: the last one.
    """

    bits: int
    a: float
    b: float

    def levels(self, codes: mx.array) -> mx.array:
        """Levels of uint8 ``codes``, float32, same shape."""
        n = 1 << self.bits
        w = (2 * codes.astype(mx.float32) + (1 - n)) * (1 / n)
        b, a_by_b, _ = self.coefficients
        fourth = _half(w * w)
        fourth = _half(fourth * fourth)
        return _half(w * _half(fourth * fourth + a_by_b)) * b

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """b, and a/b in half precision; 0 stands for the c/b of ``Gaussian``."""
        return self.b, float(np.float16(self.a / self.b)), 0.0


TRELLIS_LEVELS = {T2: Octic(4, 1.5086, 1.2422), T3: Octic(5, 1.5878, 1.4958)}
"""Trellis width -> levels, of which ``trellis.py`` numbers eight sets."""

ERRORS = {T2: 0.0757, T3: 0.0199, 4: 0.0095, 5: 0.0025, 6: 0.00064, 8: 0.00004}
"""The best width of each number of bits, and its mean square error on N(0, 1) (docs/codec.md)."""


def _half(x: Number) -> Number:
    """Float32 ``x`` in 11 significant bits, as half floats have (Veltkamp's splitting).

    Casts there and back cost eight times as much on a CPU.
    """
    scaled: Number = x * 8193.0
    rounded: Number = scaled - (scaled - x)
    return rounded


Codebook = Uniform | Gaussian | Octic


@lru_cache
def key_codebook(width: int) -> Uniform | Octic:
    """The codebook of keys of a width."""
    return TRELLIS_LEVELS.get(width) or Uniform(width)


@lru_cache
def value_codebook(width: int) -> Gaussian | Octic:
    """The codebook of values of a width."""
    return TRELLIS_LEVELS.get(width) or Gaussian(width)
