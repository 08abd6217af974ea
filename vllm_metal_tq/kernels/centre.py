"""What the decode kernels read of a ``Centre``: queries' signs, means by pairs, and tables.

``metal/centre.h`` adds f(j) = q . R_j mu to logits, window by window: in a window of S tokens f is
an even and an odd function of the distance s from its middle, sums over pairs of cos(theta s) and
of sin(theta s). Over S tokens these span few dimensions, many fewer than there are pairs, because
no pair turns by more than a radian or so between tokens: a singular value decomposition gives
functions u_k and weights w with cos(theta_c s) = sum_k w_kc u_k(s).
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..centre import TURN, TWO_PI, Centre
from ..rotation import signs

FUNCTIONS = 16  # of each parity, that fragments hold
FOLDED = 4  # of each parity, that the slow pairs become for plain multiply-adds
TOLERANCE = 5e-7  # of a cosine or sine as a sum of functions; float32 itself gives 1e-7
LAYERS = 512  # that are kept
Basis = tuple[np.ndarray, np.ndarray, float]
_EMPTY = 8  # elements of what is not read: MLX passes fewer than 8 in another address space


@lru_cache(maxsize=LAYERS)
def smoothed_signs(centre: Centre, dim: int) -> mx.array:
    """What queries are multiplied by before H: float32 ``(num_kv_heads, dim)``."""
    smoothing = np.array(centre.smoothing)
    padding = dim - smoothing.shape[1]
    smoothing = np.pad(smoothing, [(0, 0), (0, padding)], constant_values=1)
    return mx.array(np.array(signs(dim)) / smoothing)


@lru_cache(maxsize=LAYERS)
def means(centre: Centre, dim: int) -> mx.array:
    """What mu has in the two elements of each pair: float32 ``(num_kv_heads, dim / 2, 2)``."""
    by_pairs = np.array(centre.mu)[:, sorted_pairs(centre)[:, :2]]
    padding = dim // 2 - by_pairs.shape[1]
    return mx.array(np.pad(by_pairs, [(0, 0), (0, padding), (0, 0)]))


@lru_cache(maxsize=1)
def nothing() -> mx.array:
    """In place of ``turns`` where there is no centring."""
    return mx.zeros(_EMPTY, mx.uint32)


def sorted_pairs(centre: Centre) -> np.ndarray:
    """The pairs, those first that turn fastest."""
    return _sorted(np.ascontiguousarray(centre.pairs, np.uint32).tobytes())


@lru_cache
def _sorted(pairs: bytes) -> np.ndarray:
    pairs = np.frombuffer(pairs, np.uint32).reshape(-1, 3)
    return pairs[np.argsort(-np.abs(_angles(pairs[:, 2])), kind="stable")]


def fragments(centre: Centre, dim: int, window: int, dialect: str) -> mx.array:
    """``turns`` of ``decode_mma`` for windows of so many tokens."""
    return _fragments(sorted_pairs(centre).tobytes(), dim, window, dialect)


def rows(centre: Centre, dim: int, window: int) -> tuple[mx.array, int]:
    """``turns`` of ``decode_fma``, and how many pairs are functions themselves."""
    return _rows(sorted_pairs(centre).tobytes(), dim, window)


def fits(centre: Centre, dim: int, window: int) -> bool:
    """Whether ``FUNCTIONS`` functions of each parity are enough for a window."""
    return _fits(sorted_pairs(centre).tobytes(), dim, window)


@lru_cache
def _fits(pairs: bytes, dim: int, window: int) -> bool:
    pairs = _padded(np.frombuffer(pairs, np.uint32), dim)
    return max(error for _, _, error in _bases(pairs, window, FUNCTIONS)) <= TOLERANCE


@lru_cache
def _fragments(pairs: bytes, dim: int, window: int, dialect: str) -> mx.array:
    pairs = _padded(np.frombuffer(pairs, np.uint32), dim)
    bases = _bases(pairs, window, FUNCTIONS)
    tables = [_in_fragments(weights, dialect) for _, weights, _ in bases]
    tables += [_in_fragments(functions, dialect) for functions, _, _ in bases]
    return mx.array(np.concatenate([pairs.T.ravel(), *tables]))


@lru_cache
def _rows(pairs: bytes, dim: int, window: int) -> tuple[mx.array, int]:
    pairs = _padded(np.frombuffer(pairs, np.uint32), dim)
    for turned in range(0, len(pairs) + 1, 4):
        bases = _bases(pairs[turned:], window, FOLDED)
        if max(error for _, _, error in bases) <= TOLERANCE:
            break
    weights = [weights for _, weights, _ in bases]
    own = (np.cos, np.sin)
    functions = [
        np.concatenate([f(_distances(pairs[:turned], window)), u], axis=1)
        for f, (u, *_) in zip(own, bases, strict=True)
    ]
    # (lane's distance, lane, function, parity) -> (function, lane's distance, lane, parity)
    functions = np.stack(functions, axis=-1).reshape(-1, 32, turned + FOLDED, 2)
    parts = [*weights, functions.transpose(2, 0, 1, 3)]
    words = [x.astype(np.float32).ravel().view(np.uint32) for x in parts]
    return mx.array(np.concatenate([pairs.T.ravel(), *words])), turned


def _padded(pairs: np.ndarray, dim: int) -> np.ndarray:
    """Pairs ``(dim / 2, 3)``: those behind head_dim / 2 have means of zero."""
    pairs = pairs.reshape(-1, 3)
    return np.concatenate([pairs, np.zeros((dim // 2 - len(pairs), 3), np.uint32)])


def _angles(steps: np.ndarray) -> np.ndarray:
    """Radians that pairs turn by from token to token: float64, in [-pi, pi)."""
    return steps.astype(np.uint32).view(np.int32) * (TWO_PI / TURN)


def _distances(pairs: np.ndarray, window: int) -> np.ndarray:
    """Angles at the distances 1/2, 3/2... from the middle: ``(window / 2, pairs)``."""
    return np.outer(np.arange(window // 2) + 0.5, _angles(pairs[:, 2]))


def _bases(pairs: np.ndarray, window: int, count: int) -> list[Basis]:
    """For cosines, then sines: functions, weights and the largest error of a pair's own.

    Functions are ``(window / 2, count)``, weights ``(count, pairs)``, both float64 of about unit
    size. A function that is not needed is zero.
    """
    return [_basis(f(_distances(pairs, window)), count) for f in (np.cos, np.sin)]


def _basis(wanted: np.ndarray, count: int) -> Basis:
    functions = np.zeros((len(wanted), count))
    weights = np.zeros((count, wanted.shape[1]))
    left, sizes, right = np.linalg.svd(wanted, full_matrices=False)
    found = min(count, int((sizes > 1e-12 * len(wanted)).sum()))
    size = np.sqrt(len(wanted))
    functions[:, :found] = left[:, :found] * size
    weights[:found] = right[:found] * (sizes[:found, None] / size)
    return functions, weights, float(np.abs(functions @ weights - wanted).max(initial=0))


def _in_fragments(matrix: np.ndarray, dialect: str) -> np.ndarray:
    """A matrix as the words that lanes hold of its 16x16 tiles, tile by tile in a row.

    A lane holds 2 numbers of each 8x8 quarter, at (row, 2 quad) and next to it, of the quarters
    (0, 0), (8, 0), (0, 8), (8, 8). Words: see ``tq_exact_matrix`` in ``metal/dialect_*.h``.
    """
    tiles = matrix.reshape(matrix.shape[0] // 16, 2, 8, matrix.shape[1] // 16, 2, 4, 2)
    # (tile, tile of its row, row, quad, right, lower, number)
    lanes = tiles.transpose(0, 3, 2, 5, 4, 1, 6)
    lanes = lanes.reshape(-1, 32, 4, 2)[:, _lane_order(dialect)].astype(np.float64)
    if dialect == "metal":
        words = lanes.astype(np.float32).view(np.uint32).reshape(-1, 32, 2, 4)
        return words.transpose(0, 2, 1, 3).ravel()
    nearest = lanes.astype(np.float16)
    rest = (lanes - nearest).astype(np.float16)
    words = np.stack([nearest, rest], axis=1).view(np.uint32)
    return words.ravel()


def _lane_order(dialect: str) -> np.ndarray:
    """Which lane of row-by-row order, 4 row + quad, each lane is: TQ_ROW and TQ_QUAD."""
    lane = np.arange(32)
    if dialect == "metal":
        return 4 * ((lane >> 2 & 4) | (lane >> 1 & 3)) + ((lane >> 2 & 2) | (lane & 1))
    return lane
