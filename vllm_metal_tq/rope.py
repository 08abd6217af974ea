"""The rotary embedding of a layer as integer phases, found by probing what it does.

Any callable ``rope(x, offset=int)`` over ``(1, heads, tokens, head_dim)`` is put to unit vectors at
the positions 1, 2, 4, ... That shows which elements turn together (adjacent, half-split, or only
some of them), by how much per position, and with what amplitude (YaRN's, SU-scaled), without
knowing its class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .centre import TURN, TWO_PI

LAST = 20  # the last probed position is 2^20
FAR = 4096.0  # radians up to which a float32 sine is trusted
CLOSE = 1e-3  # radians by which a doubled angle may be off


@dataclass(frozen=True, eq=False)
class Rope:
    """What a rotary embedding does.

    Attributes:
        pairs: as ``Centre.pairs``.
        amplitude: float32 ``(head_dim,)``, the factor of each element's length.
    """

    pairs: np.ndarray
    amplitude: np.ndarray


def constant(head_dim: int) -> Rope:
    """The embedding of layers without RoPE: nothing turns."""
    elements = np.arange(head_dim, dtype=np.uint32).reshape(-1, 2)
    still = np.zeros((len(elements), 1), np.uint32)
    return Rope(np.concatenate([elements, still], axis=1), np.ones(head_dim, np.float32))


def probe(rope: Callable[..., mx.array], head_dim: int) -> Rope:
    """Find the pairs, steps and amplitude of ``rope``.

    The angle of a pair is followed from position 1, where it is taken to lie within half a turn,
    through every doubling for as long as it stays below ``FAR`` and all are twice the last ones.
    The last angle gives the step: to 1e-7 rad of 4096 for fast pairs, and of what they reach at
    position 2^20 for slow ones. Powers of two add no rounding of their own.

    Args:
        rope: takes float32 ``(1, head_dim, 1, head_dim)`` and ``offset=``.
        head_dim: elements of a head vector.

    Raises:
        ValueError: it is no rotary embedding: some element turns into none or several others.
    """
    with mx.stream(mx.cpu):  # GPUs' fast sines are wrong far from zero
        units = mx.eye(head_dim)[None, :, None, :]
        images = mx.stack([rope(units, offset=2**k)[0, :, 0] for k in range(LAST + 1)])
        start = np.array(rope(units, offset=0)[0, :, 0], np.float64)
        images = np.array(images, np.float64)  # [k, unit vector, element]
    amplitude = np.diag(start)
    if np.abs(start - np.diag(amplitude)).max() > 1e-6 * np.abs(amplitude).max():
        raise ValueError("no rotary embedding: it turns at position 0")
    first, second = _pairs(np.abs(images / amplitude[:, None]).max(axis=0))
    angles = np.arctan2(images[:, first, second], images[:, first, first])
    turns = _follow(angles) / TWO_PI
    backwards = turns < 0
    first, second = np.where(backwards, second, first), np.where(backwards, first, second)
    steps = np.round(np.abs(turns) * TURN).astype(np.uint32)
    pairs = np.stack([first, second, steps], axis=1).astype(np.uint32)
    return Rope(pairs, amplitude.astype(np.float32))


def _pairs(reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and second elements, from how far each unit vector ever reaches into each element."""
    away = np.where(np.eye(len(reach), dtype=bool), 0, reach)
    partner = np.where(away.max(axis=1) > 1e-4, away.argmax(axis=1), -1)
    turning, still = np.flatnonzero(partner >= 0), np.flatnonzero(partner < 0)
    mutual = (partner[partner[turning]] == turning).all()
    if not mutual or ((away > 1e-4).sum(axis=1) > 1).any() or len(still) % 2:
        raise ValueError("no rotary embedding: its elements do not turn in pairs")
    first = turning[turning < partner[turning]]
    half = len(still) // 2
    return (
        np.concatenate([first, still[:half]]),
        np.concatenate([partner[first], still[half:]]),
    )


def _follow(angles: np.ndarray) -> np.ndarray:
    """Radians per position of each pair, from its angles ``(k, pairs)`` at positions 2^k."""
    whole = angles[0]
    rate: np.ndarray = whole.copy()
    near = np.ones(len(whole), bool)
    for k, angle in enumerate(angles[1:], start=1):
        off = np.mod(angle - 2 * whole + math.pi, TWO_PI) - math.pi
        whole = 2 * whole + off
        near &= np.abs(whole) < FAR
        if (np.abs(off[near]) > CLOSE).any():
            break  # from here on it is another embedding (dynamic NTK scaling)
        rate = np.where(near, whole / 2**k, rate)
    return rate


def of_model(model: nn.Module, head_dim: int) -> list[Rope]:
    """The different rotary embeddings among a model's modules, for this head_dim."""
    found: dict[bytes, Rope] = {}
    for _, module in model.named_modules():
        if "offset" not in inspect.signature(type(module).__call__).parameters:
            continue
        try:
            rope = probe(module, head_dim)
        except Exception:  # a module with an offset that is something else, or of another size
            continue
        found.setdefault(rope.pairs.tobytes() + rope.amplitude.tobytes(), rope)
    return list(found.values())
