"""The captured head, taken through the codec's steps by the codec's own functions."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from capture import FILE

from vllm_metal_tq.centre import Centre
from vllm_metal_tq.rotation import rotate


@dataclass(frozen=True)
class Head:
    """One KV head of the demo model over a text.

    Attributes:
        keys: float32 ``(n, head_dim)``, after RoPE.
        values: the same shape.
        centre: what calibration knows of it.
    """

    keys: np.ndarray
    values: np.ndarray
    centre: Centre

    @property
    def means(self) -> np.ndarray:
        """R_j mu of each position, ``(n, head_dim)``."""
        return np.array(self.centre.at(mx.arange(len(self.keys)))[0])

    @property
    def short_keys(self) -> np.ndarray:
        """Keys without the mean, where that makes them shorter."""
        rest = self.keys - self.means
        shorter = np.linalg.norm(rest, axis=1) < np.linalg.norm(self.keys, axis=1)
        return np.where(shorter[:, None], rest, self.keys)


def head() -> Head:
    """What ``capture.py`` wrote."""
    with np.load(FILE) as file:
        parts = [mx.array(file[name])[None] for name in ("mu", "smoothing", "value_mean")]
        centre = Centre(file["pairs"], *parts)
        return Head(file["keys"].astype(np.float32), file["values"].astype(np.float32), centre)


def rotated(x: np.ndarray) -> np.ndarray:
    """Rotated head vectors."""
    return np.array(rotate(mx.array(x)))


def standardised(x: np.ndarray) -> np.ndarray:
    """All elements, each over the root mean square of its vector."""
    return (x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))).ravel()
