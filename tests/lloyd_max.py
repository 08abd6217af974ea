"""Oracle: Lloyd-Max's quantiser of N(0, 1) by Lloyd's iteration, in float64."""

import math
from functools import lru_cache

import numpy as np

_cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))


def _pdf(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@lru_cache
def lloyd_max(bits: int) -> np.ndarray:
    """Levels, ascending. The error of the 8-bit ones is within 0.1 % of the optimum's."""
    n = 2**bits
    # Panter and Dite: the density of levels goes with the cube root of the distribution's.
    grid = np.linspace(-8, 8, 20001)
    mass = np.cumsum(_pdf(grid / math.sqrt(3)))
    levels = np.interp((np.arange(n) + 0.5) / n, mass / mass[-1], grid)
    for _ in range(2000):
        levels = _centroids(levels)
    return levels


def distortion(levels: np.ndarray) -> float:
    """Mean square error of N(0, 1) at nearest levels."""
    low, high = _cells(levels)
    mass, first = _cdf(high) - _cdf(low), _pdf(low) - _pdf(high)
    second = mass + _edge(low) - _edge(high)
    return float((second - 2 * levels * first + levels**2 * mass).sum())


def _cells(levels):
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    return edges[:-1], edges[1:]


def _centroids(levels):
    low, high = _cells(levels)
    return (_pdf(low) - _pdf(high)) / (_cdf(high) - _cdf(low))


def _edge(x):
    return np.where(np.isfinite(x), x, 0) * _pdf(x)
