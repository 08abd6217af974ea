"""What is known of a whole model: a centre for each layer, measured once and kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from platformdirs import user_cache_path

from . import safetensors
from .centre import Centre, turn
from .config import QUANT_OF, TurboQuantConfig
from .part import whole_fingerprint
from .rope import Rope

FILE_NAME = "turboquant.safetensors"  # in a model's folder
_FORMAT = "vllm-metal-tq calibration"
_VERSION = "1"
_PARTS = ("pairs", "mu", "smoothing", "value_mean")
_EXPONENT = 1 / 8  # of E[q^2] / E[(k - mu)^2]; docs/quality.md

WORTH = 0.05
"""Share of the square error of a layer's logits, or else of its values, that a centre has to save.

Decoding with a centre takes 15 to 25 % longer. KL divergence goes with the square error, and
roundings alone change it by several percent (docs/quality.md): less than that is no gain.
"""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Centres of a model's layers.

    It is always of the whole model, also where a process holds a part of it: see ``Part``.

    Attributes:
        centres: one for each cache of the model's prompt cache, None where there is none.
        fingerprint: of the model that it was measured on; see ``fingerprint``.
        config: widths for each layer, where they were measured as well.
    """

    centres: tuple[Centre | None, ...]
    fingerprint: str
    config: TurboQuantConfig | None = None

    def save(self, file: Path) -> None:
        """Write a safetensors file; what it replaces stays whole until then.

        Raises:
            OSError: the file cannot be written.
        """
        arrays = {
            f"{i}.{name}": array
            for i, centre in enumerate(self.centres)
            if centre
            for name, array in zip(_PARTS, centre.arrays, strict=True)
        }
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "layers": str(len(self.centres)),
            "widths": _widths(self.config) if self.config else "",
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        safetensors.write(file, "the calibration", arrays, metadata)


def _widths(config: TurboQuantConfig) -> str:
    """The widths of layers as ``from_names`` takes them, without presets: those may change."""
    return ",".join(
        f"{first}-{last}={QUANT_OF[k_width]}/{QUANT_OF[v_width]}"
        for first, last, k_width, v_width in config.layer_overrides
    )


def load(file: Path, model: nn.Module) -> Calibration:
    """Read what ``Calibration.save`` wrote, for ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind or version, or was measured on another model.
    """
    if not file.is_file():
        raise FileNotFoundError(f"calibration {str(file)!r}: no such file")
    damaged = f"calibration {str(file)!r} is damaged or foreign"
    anew = "make it anew with `vllm-metal-tq calibrate`"
    try:
        arrays, metadata = safetensors.read(file)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{damaged}: {error}; {anew}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{damaged}: no {_FORMAT}; {anew}")
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"calibration {str(file)!r} has version {metadata.get('version')}: "
            f"{_VERSION} can be read; {anew}"
        )
    if metadata.get("fingerprint") != fingerprint(model):
        raise ValueError(
            f"calibration {str(file)!r} was measured on another model; "
            "make one for this model with `vllm-metal-tq calibrate`"
        )
    try:
        layers = int(metadata["layers"])
        if not 0 <= layers <= len(named_weights(model)):  # every layer has weights
            raise ValueError(f"{layers} layers")
        centres = [_centre(arrays, i) for i in range(layers)]
        widths = metadata["widths"]
        config = TurboQuantConfig.from_names(layers=widths) if widths else None
    except (KeyError, ValueError) as error:
        raise ValueError(f"{damaged}: {error}; {anew}") from error
    return Calibration(tuple(centres), metadata["fingerprint"], config)


def _centre(arrays: dict[str, mx.array], layer: int) -> Centre | None:
    if f"{layer}.mu" not in arrays:
        return None
    parts = [arrays[f"{layer}.{name}"] for name in _PARTS]
    if parts[1].ndim != 2:
        raise ValueError(f"layer {layer} has mean keys of shape {parts[1].shape}")
    return Centre.from_arrays(parts, *parts[1].shape)


def place(model: nn.Module) -> Path:
    """Where the calibration of a model is kept: in the user's cache directory."""
    name = f"{fingerprint(model)}.safetensors"
    return user_cache_path("vllm-metal-tq") / "calibrations" / name


def find(model: nn.Module, folder: str | Path | None = None) -> Calibration | None:
    """Load the calibration beside the model, or else the one in the user's cache directory.

    Args:
        model: a loaded model.
        folder: the model's folder, where it has one.

    Returns:
        The calibration, or None where there is no file.

    Raises:
        ValueError: the file cannot be used; see ``load``.
    """
    beside = [Path(folder) / FILE_NAME] if folder else []
    file = next((file for file in [*beside, place(model)] if file.is_file()), None)
    return load(file, model) if file else None


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that tell models apart: all shapes and types, and some weights.

    Of a part of a model they are the whole model's.
    """
    if known := whole_fingerprint(model):
        return known
    weights = named_weights(model)
    digest = hashlib.sha256(repr([(name, x.shape, str(x.dtype)) for name, x in weights]).encode())
    for _, x in weights[:: max(len(weights) // 16, 1)]:
        some = x.reshape(-1)[:64]
        floating = mx.issubdtype(some.dtype, mx.floating)
        digest.update(np.array(some.astype(mx.float32) if floating else some).tobytes())
    return digest.hexdigest()[:32]


def named_weights(model: nn.Module) -> list[tuple[str, mx.array]]:
    """A model's weights by the paths of their modules, in the paths' order."""
    return sorted(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


class Statistics:
    """Sums over the tokens of a text, from which a layer's centre follows.

    Args:
        rope: the layer's rotary embedding; ``rope.constant`` where there is none.
    """

    def __init__(self, rope: Rope):
        self._rope = rope
        self._count = 0
        self._near: mx.array | None = None  # about the keys' mean, else squares would cancel
        self._sums: list[mx.array] = []

    def add(self, queries: mx.array | None, keys: mx.array, values: mx.array, start: int) -> None:
        """Count tokens, ``(1, heads, n, head_dim)`` each, after RoPE, from position ``start``.

        Without queries there is no smoothing.
        """
        keys, values = (x[0].astype(mx.float32) for x in (keys, values))
        num_kv_heads, count, head_dim = keys.shape
        positions = mx.arange(start, start + count)
        keys = turn(keys, positions, self._rope.pairs, inverse=True)
        if self._near is None:
            self._near = keys.mean(axis=1, keepdims=True)
        keys = keys - self._near
        sums = [x.sum(axis=1) for x in (keys, mx.square(keys), values, mx.square(values))]
        if queries is None:
            sums.append(mx.zeros_like(sums[0]))
        else:
            asked = mx.square(queries[0].astype(mx.float32))
            sums.append(asked.reshape(num_kv_heads, -1, head_dim).mean(axis=1) * count)
        self._count += count
        earlier = self._sums or [mx.zeros_like(x) for x in sums]
        self._sums = [a + b for a, b in zip(earlier, sums, strict=True)]
        mx.eval(self._sums)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What ``joined`` takes: pairs, the number of tokens, and float32 ``(6, heads, dim)``."""
        if self._near is None:
            raise ValueError("statistics without tokens cannot be joined")
        sums = mx.stack([self._near[:, 0], *self._sums])
        return self._rope.pairs, np.array(self._count), np.array(sums)

    @classmethod
    def joined(cls, shares: Sequence[Sequence[np.ndarray]]) -> Statistics:
        """The statistics of all KV heads, from the ``arrays`` of shares of them, in their order."""
        pairs, count, _ = shares[0]
        statistics = cls(Rope(pairs, np.ones(2 * len(pairs), np.float32)))
        near, *sums = mx.array(np.concatenate([arrays[2] for arrays in shares], axis=1))
        statistics._count, statistics._near, statistics._sums = int(count), near[:, None], sums
        return statistics

    def centre(self) -> Centre | None:
        """The centre of the tokens so far, or None where it would save less than ``WORTH``."""
        if self._near is None:
            raise ValueError("a centre needs tokens: none were added")
        rest, square, value_mean, value_square, query_square = (x / self._count for x in self._sums)
        mu = rest + self._near[:, 0]
        pairs = self._rope.pairs
        spread, query_square = np.array(square - mx.square(rest)), np.array(query_square)
        if not query_square.any():
            query_square = spread
        t = (_by_pair(query_square, pairs) / _by_pair(spread, pairs)) ** _EXPONENT
        t /= np.exp(np.log(t).mean(axis=1, keepdims=True))
        spread, key_square = np.maximum(spread, 0), spread + np.square(np.array(mu))
        of_logits = _saved(
            query_square.sum(axis=1) * key_square.sum(axis=1),
            (query_square / t**2).sum(axis=1) * (spread * t**2).sum(axis=1),
        )
        value_square, left = np.array(value_square), np.array(value_square - value_mean**2)
        if max(of_logits, _saved(value_square.sum(axis=1), left.sum(axis=1))) < WORTH:
            return None
        return Centre(pairs, mu, mx.array(t.astype(np.float32)), value_mean)


def _saved(before: np.ndarray, after: np.ndarray) -> float:
    """The share that goes, a mean over KV heads, of square errors ``(num_kv_heads,)``.

    A code's error is in proportion to the length of what is encoded, wherever it points: the
    rotation spreads it evenly. Flags, which keep a mean from making a vector longer, are left out.
    """
    return float(1 - (after / np.maximum(before, 1e-30)).mean())


def _by_pair(squares: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Means over pairs of ``(num_kv_heads, head_dim)``, kept away from zero, in each element."""
    first, second = pairs[:, 0], pairs[:, 1]
    out = np.empty(squares.shape)
    out[:, first] = out[:, second] = (squares[:, first] + squares[:, second]) / 2
    kept: np.ndarray = np.maximum(out, 1e-6 * out.max(axis=1, keepdims=True) + 1e-30)
    return kept
