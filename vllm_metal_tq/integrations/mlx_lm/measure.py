"""Measure the centres of a model's layers by running it over a text."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import numpy as np

from ... import rope
from ...attention import Mask
from ...calibration import Calibration, Statistics, find, fingerprint, place
from ...centre import Centre, turn
from ...config import CALIBRATION_TOKENS
from ...part import Part, whole_fingerprint
from ...rope import Rope
from ...types import Progress, Tokenizer
from . import distributed, hook
from .parts import keys_of, with_keys
from .probe import Attention, Reader, alone, attention, plain_attention

CHUNK = 256
SKIPPED = 4  # tokens at the start, attention sinks among them, whose keys are unlike all others
_FAR = 1000  # a position at which different embeddings differ
_CLOSE = 0.02  # relative error of keys that are rounded to bfloat16


Halves = tuple[mx.array, mx.array]
"""Something of keys, and of values."""


class _At(host.KVCache):
    """An empty cache that claims to be at some position, and keeps the keys that it gets."""

    def __init__(self, position: int):
        super().__init__()
        self.offset = position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.stored, self._values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.stored, self._values

    def make_mask(self, N: int, return_array: bool = False, **_: object) -> Mask:  # noqa: N803
        """Of a token that sees itself alone."""
        return mx.ones((N, N), mx.bool_) if return_array else None


class _Recorder:
    """mlx_lm's own cache of a layer, which adds up what the layer stores and asks."""

    def __init__(self, cache: Any, statistics: Statistics):
        self._cache = cache
        self._statistics = statistics

    # Stages of a pipeline set it, so that what they send is not left out.
    keys = property(
        lambda self: self._cache.keys, lambda self, new: setattr(self._cache, "keys", new)
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        missing = keys.shape[3] - values.shape[3]
        self._new = keys, mx.pad(values, [(0, 0)] * 3 + [(0, missing)])
        fetched: tuple[mx.array, mx.array] = self._cache.update_and_fetch(keys, values)
        return fetched

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        self._asked(queries)
        return hook.dense_attention(queries, keys, values, None, scale, mask, sinks)

    def _asked(self, queries: mx.array) -> None:
        self._add(queries)

    def _add(self, queries: mx.array | None) -> None:
        length = self._new[0].shape[2]
        start = self._cache.offset - length
        skip = max(SKIPPED - start, 0)
        if skip < length:
            new_keys, new_values = (x[:, :, skip:] for x in self._new)
            asked = None if queries is None else queries[:, :, skip:]
            self._statistics.add(asked, new_keys, new_values, start + skip)


class _KeyRecorder(_Recorder):
    """The same for code of the model's own, of whose queries nothing is known."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        fetched = super().update_and_fetch(keys, values)
        self._add(None)
        return fetched

    def _asked(self, queries: mx.array) -> None:
        pass  # what it is asked may be some of the queries, or none


def calibrate(
    model: nn.Module,
    token_ids: list[int],
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Measure a calibration on a text, for use with every text.

    Args:
        model: a model that mlx_lm has loaded.
        token_ids: the text; a thousand tokens are plenty.
        progress: called with tokens done and tokens in all.

    Returns:
        The centres of every layer that can be compressed, for ``make_prompt_cache`` and
        ``CachePools``; ``save`` keeps them in a file. Where several processes hold the model
        all of them measure, each its own part, and get the whole.

    Raises:
        ValueError: the text is too short.
    """
    if len(token_ids) < 64:
        raise ValueError(f"the text has {len(token_ids)} tokens: calibration takes at least 64")
    hook.install(model)
    # Where the embedding is not known, the mean of keys after it is a centre as well, if a worse
    # one: flags take it only where it helps.
    layers = attention(model)
    every = [
        Statistics(found or rope.constant(layer.head_dim)) if isinstance(layer, Attention) else None
        for found, layer in zip(layer_ropes(model), layers, strict=True)
    ]
    if not _anywhere(any(every), model):
        num_layers = Part.of(model, len(every)).num_layers
        return Calibration((None,) * num_layers, fingerprint(model))
    caches = hook.host_caches(model)
    for i, (statistics, layer) in enumerate(zip(every, layers, strict=True)):
        if statistics and isinstance(layer, Attention):
            kind = _KeyRecorder if layer.reader is Reader.CODE else _Recorder
            caches[i] = with_keys(caches[i], kind(keys_of(caches[i]), statistics))
    for start in range(0, len(token_ids), CHUNK):
        chunk = token_ids[start : start + CHUNK]
        mx.eval(model(mx.array([chunk]), cache=caches))
        progress(start + len(chunk), len(token_ids))
    centres = (s.centre() if s else None for s in _whole(every, model))
    return Calibration(tuple(centres), fingerprint(model))


def _anywhere(here: bool, model: nn.Module) -> bool:
    """Whether it is so in any of the processes that hold ``model`` together."""
    return here if whole_fingerprint(model) is None else bool(distributed.most(here))


def _whole(every: list[Statistics | None], model: nn.Module) -> list[Statistics | None]:
    """The statistics of all layers and heads, where processes hold parts of them."""
    part = Part.of(model, len(every))
    if part.fingerprint is None:
        return every
    names = "pairs", "count", "sums"
    mine = {
        f"{layer}.{name}": array
        for layer, s in enumerate(every, start=part.first)
        for name, array in zip(names, s.arrays if s else (), strict=False)
    }
    parts = distributed.gather(mine)
    shares = [
        [[p[f"{layer}.{name}"] for name in names] for p in parts if f"{layer}.sums" in p]
        for layer in range(part.num_layers)
    ]
    return [Statistics.joined(found) if found else None for found in shares]


def find_or_calibrate(
    model: nn.Module,
    tokenizer: Tokenizer,
    folder: str | Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """The calibration that ``calibration.find`` finds; else one is made and kept.

    Of several processes that hold a model each reads and writes on its own machine; files on one
    machine take each other's place whole, with the same in them.

    Args:
        model: a model that mlx_lm has loaded.
        tokenizer: its tokenizer.
        folder: the model's folder, or its name.
        progress: called with tokens done and tokens in all.

    Raises:
        ValueError: the file that was found cannot be used.
    """
    found = find(model, folder if folder and Path(folder).is_dir() else None)
    if _anywhere(found is None, model) or found is None:  # wherever it is that it is missing
        text = (files("vllm_metal_tq") / "data" / "calibration.txt").read_text(encoding="utf-8")
        found = calibrate(model, tokenizer.encode(text)[:CALIBRATION_TOKENS], progress)
        try:
            found.save(place(model))
        except OSError as error:
            logging.getLogger(__name__).warning("the calibration is not kept: %s", error)
    return found


def from_biases(model: nn.Module) -> Calibration:
    """What can be known without a text: the bias of k_proj is most of the keys' mean.

    Layers whose k_proj has no bias, or whose keys are normalised after it, get no centre.
    """
    shapes = plain_attention(model)
    biases: list[Halves | None] = [None] * len(shapes)
    layers = getattr(model, "layers", [])
    if len(layers) == len(shapes):
        pairs = zip(layers, shapes, strict=True)
        biases = [shape and _biases(layer, shape) for layer, shape in pairs]
    if not any(biases):
        return Calibration((None,) * len(biases), "")
    centres = [
        _from_bias(found, *bias) if bias and found else None
        for bias, found in zip(biases, layer_ropes(model), strict=True)
    ]
    return Calibration(tuple(centres), "")


def _biases(layer: nn.Module, shape: tuple[int, int]) -> Halves | None:
    """Biases of a layer's keys and values: float32 ``(num_kv_heads, head_dim)`` each, or None."""
    head_dim, num_kv_heads = shape
    for _, module in layer.named_modules():
        projection = getattr(module, "k_proj", None)
        bias = getattr(projection, "bias", None)
        if bias is None or bias.size != head_dim * num_kv_heads or "k_norm" in module:
            continue
        value_bias = getattr(getattr(module, "v_proj", None), "bias", mx.zeros_like(bias))
        of_keys, of_values = (
            x.astype(mx.float32).reshape(num_kv_heads, -1) for x in (bias, value_bias)
        )
        missing = head_dim - of_values.shape[1]
        return of_keys, mx.pad(of_values, [(0, 0), (0, missing)])
    return None


def _from_bias(found: Rope, key_bias: mx.array, value_bias: mx.array) -> Centre:
    mu = key_bias * mx.array(found.amplitude)
    return Centre(found.pairs, mu, mx.ones_like(mu), value_bias)


def layer_ropes(model: nn.Module) -> list[Rope | None]:
    """The rotary embedding of each cache's layer, None where it is not known.

    The model itself decides between the embeddings that its modules hold, and none at all: the
    keys of a single token, which attends to itself alone, differ between two positions by
    nothing but the embedding.
    """
    near, far = _stored(model, 0), _stored(model, _FAR)
    candidates: dict[int, list[Rope]] = {}
    found: list[Rope | None] = []
    for first, second in zip(near, far, strict=True):
        if first is None or second is None:
            found.append(None)
            continue
        head_dim = first.shape[-1]
        if head_dim not in candidates:
            candidates[head_dim] = [*rope.of_model(model, head_dim), rope.constant(head_dim)]
        where = mx.array([_FAR])
        errors = [
            float(mx.linalg.norm(turn(first, where, c.pairs) - second) / mx.linalg.norm(second))
            for c in candidates[head_dim]
        ]
        best = int(np.argmin(errors))
        found.append(candidates[head_dim][best] if errors[best] < _CLOSE else None)
    return found


def _stored(model: nn.Module, position: int) -> list[mx.array | None]:
    """Keys that each plain layer stores for single tokens at a position, float32."""
    shapes = plain_attention(model)
    probes = [shape and _At(position) for shape in shapes]
    caches = [
        with_keys(cache, probe) if probe else cache
        for cache, probe in zip(hook.host_caches(model), probes, strict=True)
    ]
    with alone(model):  # what comes in does not matter
        model(mx.array([[1], [2], [3]]), cache=caches)
    return [probe.stored.astype(mx.float32) if probe else None for probe in probes]
