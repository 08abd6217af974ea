"""Which layers of a model keep keys and values, found by watching them use their caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host

from ...attention import Mask
from . import hook
from .cache import TurboQuantKVCache
from .parts import parts

# Why mlx_lm's own cache stays in place.
INSIDE = "a cache whose insides the model reads or writes"
INDEX = "an index, keys without values"
LATENT = "latent attention (MLA)"
SEVERAL = "several caches in one layer"
SIZES = "values larger than keys"
TWICE = "a cache that is written twice a step"
UNUSED = "a cache that nothing is stored in"
WINDOW = "sliding window"
CHUNKS = "attention within chunks"
STATE = "a state, no keys"
_OF_CACHES = (
    (host.RotatingKVCache, WINDOW),
    (host.ChunkedKVCache, CHUNKS),
    (host.ArraysCache, STATE),
)
_CHUNKS = 2, 1  # tokens: a piece of a prompt, and a step of decoding

Shape = tuple[int, int]
"""head_dim and num_kv_heads of a layer's keys."""


class Reader(Enum):
    """Who reads the keys and values of a layer."""

    ITSELF = "compressed"
    LAYERS = "compressed, read by other layers too"
    CODE = "compressed, restored for the model's own code"


@dataclass(frozen=True)
class Attention:
    """A layer whose keys and values can be compressed.

    Attributes:
        head_dim: elements of a key.
        v_head_dim: elements of a value, at most as many.
        num_kv_heads: heads of both.
        reader: who reads them: itself once, layers through mlx_lm's attention function, or code
            of the model's own.
        window: how many tokens a query sees, itself included; 0 is all.
    """

    head_dim: int
    v_head_dim: int
    num_kv_heads: int
    reader: Reader
    window: int = 0

    @property
    def shape(self) -> Shape:
        """See ``Shape``."""
        return self.head_dim, self.num_kv_heads


@dataclass
class _Step:
    """What one cache gave its model in one step."""

    stored: tuple[mx.array, mx.array]
    handed_out: tuple[mx.array, mx.array]
    again: bool = False  # whether they were asked for once more

    def holds(self, array: mx.array) -> bool:
        return any(array is x for x in self.handed_out)


class _Probe:
    """A dense cache that records what its model does with it.

    It has what a ``TurboQuantKVCache`` has of mlx_lm's caches. Whatever else is asked of it shows
    a model that knows the insides of mlx_lm's.
    """

    bits = TurboQuantKVCache.bits  # which reports a missing hook

    def __init__(self, window: int) -> None:
        self._inner = host.KVCache()
        self._window = window
        self.steps: list[_Step] = []
        self.opened = False

    @property
    def offset(self) -> int:
        return int(self._inner.offset)

    def make_mask(self, *args: Any, **options: Any) -> Any:
        return self._inner.make_mask(*args, **options)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.steps.append(_Step((keys, values), self._inner.update_and_fetch(keys, values)))
        return self.steps[-1].handed_out

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        self.steps[-1].again = True
        return self.steps[-1].handed_out

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        return hook.dense_attention(queries, keys, values, None, scale, mask, sinks)

    def size(self) -> int:
        return int(self._inner.size())

    def empty(self) -> bool:
        return bool(self._inner.empty())

    def _inside(self, name: str) -> Any:
        self.opened = True
        return getattr(self._inner, name)

    keys = property(lambda self: self._inside("keys"), lambda self, new: self._inside("keys"))
    values = property(lambda self: self._inside("values"), lambda self, new: self._inside("values"))

    def __getattr__(self, name: str) -> Any:
        return self._inside(name)

    def found(self, steps: list[list[hook.Attended]], probes: list[_Probe]) -> Attention | str:
        """Its layer's attention, or why it cannot be compressed."""
        if not self.steps:
            return UNUSED
        if len(self.steps) != len(_CHUNKS):
            return TWICE
        keys, values = self.steps[0].stored
        if keys is values or not values.shape[3]:
            return INDEX
        readers = [self._reader(i, attended, probes) for i, attended in enumerate(steps)]
        if LATENT in readers:
            return LATENT
        if self.opened:
            return INSIDE
        if values.shape[3] > keys.shape[3]:
            return SIZES
        reader = [kind for kind in Reader if kind in readers][-1]
        if self._window and reader is Reader.CODE:
            return WINDOW
        return Attention(keys.shape[3], values.shape[3], keys.shape[1], reader, self._window)

    def _reader(
        self, number: int, attended: list[hook.Attended], probes: list[_Probe]
    ) -> Reader | str:
        """Who read in a step; of several, the one that asks for most."""
        step = self.steps[number]
        everything = [probe.steps[number] for probe in probes if len(probe.steps) > number]
        whole, changed = [], False
        for _, keys, values, cache in attended:
            mine = step.holds(keys), step.holds(values)
            if any(mine) and keys is values:
                return LATENT
            if all(mine):
                whole.append(cache)
            elif any(mine) or (cache is self and not any(x.holds(keys) for x in everything)):
                changed = True  # what was made of them
        if changed or not whole:
            return Reader.CODE
        itself = len(whole) == 1 and whole[0] is self and not step.again
        return Reader.ITSELF if itself else Reader.LAYERS


def attention(model: nn.Module) -> list[Attention | str]:
    """What each of the model's caches serves, or why mlx_lm's own stays in place.

    Found by building the graph of two tokens, and of one after them, and never evaluating it. The
    hook must be installed.
    """
    caches = hook.host_caches(model)
    probes = [[_probe(part) for part in parts(cache)] for cache in caches]
    ours = [part for layer in probes for part in layer if isinstance(part, _Probe)]
    given = [
        host.CacheList(*layer) if isinstance(cache, host.CacheList) else layer[0]
        for cache, layer in zip(caches, probes, strict=True)
    ]
    steps = []
    for length in _CHUNKS:
        with alone(model), hook.watched() as attended:
            model(mx.zeros((1, length), mx.int32), cache=given)
        steps.append(attended)
    return [_of_layer([_found(part, steps, ours) for part in layer]) for layer in probes]


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Let a stage of a pipeline run by itself: on the embeddings, with nobody before or after."""
    stages: Any = getattr(model, "model", None)
    if getattr(stages, "pipeline_size", 1) == 1:
        yield
        return
    place = stages.pipeline_rank, stages.pipeline_size
    stages.pipeline_rank, stages.pipeline_size = 0, 1
    try:
        yield
    finally:
        stages.pipeline_rank, stages.pipeline_size = place


def _probe(cache: object) -> Any:
    window = _window(cache)
    return _Probe(window) if window or type(cache) is host.KVCache else cache


def _window(cache: Any) -> int:
    """How many tokens a query sees of what mlx_lm's cache of a layer keeps; 0 is all."""
    rotates = type(cache) is host.RotatingKVCache and cache.keep == 0
    return int(cache.max_size) if rotates else 0


def _found(part: object, steps: list[list[hook.Attended]], probes: list[_Probe]) -> Attention | str:
    if isinstance(part, _Probe):
        return part.found(steps, probes)
    of_classes = (why for kind, why in _OF_CACHES if isinstance(part, kind))
    return next(of_classes, f"a cache of its own ({type(part).__name__})")


def _of_layer(found: list[Attention | str]) -> Attention | str:
    """What becomes of the caches of one layer: one for keys and values beside states, or none."""
    with_keys = [x for x in found if x != STATE]
    if len(with_keys) == 1:
        return with_keys[0]
    refused = dict.fromkeys(x for x in with_keys if isinstance(x, str))
    if not with_keys:
        return STATE
    return ", ".join(refused) or SEVERAL


def plain_attention(model: nn.Module) -> list[Shape | None]:
    """The shape of each of the model's caches, None where it cannot be replaced."""
    return [x.shape if isinstance(x, Attention) else None for x in attention(model)]
