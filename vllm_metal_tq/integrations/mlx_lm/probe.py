"""Which layers of a model are plain attention, found by watching them use their caches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host

from . import hook

# Why mlx_lm's own cache stays in place.
CHANGED = "keys or values changed after they were stored"
LATENT = "latent attention (MLA)"
OWN = "attention of the model's own"
SHARED = "keys that are read more than once"
SIZES = "keys and values of different head_dim"
WINDOW = "sliding window"
CHUNKS = "attention within chunks"
STATE = "a state, no keys"
SEVERAL = "several caches in one layer"
_OF_CACHES = (
    (host.RotatingKVCache, WINDOW),
    (host.ChunkedKVCache, CHUNKS),
    (host.ArraysCache, STATE),
    (host.CacheList, SEVERAL),
)

Shape = tuple[int, int]
"""head_dim and num_kv_heads of a layer of plain attention."""


class _Probe(host.KVCache):
    """A dense cache that records what its layer fetches from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[tuple[mx.array, mx.array]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.fetched.append(super().update_and_fetch(keys, values))
        return self.fetched[-1]

    def found(self, attended: list[hook.Attended]) -> Shape | str:
        """Its layer's shape where that is plain attention, else why it is not."""
        if len(self.fetched) != 1:
            return OWN
        keys, values = self.fetched[0]
        readers = [
            (queries, read_keys, read_values, cache is self)
            for queries, read_keys, read_values, cache in attended
            if cache is self or read_keys is keys or read_values is values
        ]
        if not readers:
            return OWN
        queries, read_keys, read_values, itself = readers[0]
        if len(readers) > 1 or not itself:
            return SHARED
        if read_keys is read_values:
            return LATENT
        if read_keys is not keys or read_values is not values:
            return CHANGED
        if not queries.shape[3] == keys.shape[3] == values.shape[3]:
            return SIZES
        return keys.shape[3], keys.shape[1]


def attention(model: nn.Module) -> list[Shape | str]:
    """The shape of each of the model's caches, or why mlx_lm's own stays in place.

    Found by building the graph of one token and never evaluating it: a layer qualifies if it
    stores keys and values of one head_dim once and they are attended to once, as they are, by
    itself: a layer that reads another's keys knows the newest of them only.
    The hook must be installed.
    """
    caches = hook.host_caches(model)
    probes = [_Probe() if _replaceable(cache) else cache for cache in caches]
    with hook.watched() as attended:
        model(mx.zeros((1, 1), mx.int32), cache=probes)
    return [x.found(attended) if isinstance(x, _Probe) else _why_kept(x) for x in probes]


def _replaceable(cache: object) -> bool:
    return type(cache) is host.KVCache or window(cache) > 0


def window(cache: Any) -> int:
    """How many tokens a query sees of what mlx_lm's cache of a layer keeps; 0 is all."""
    rotates = type(cache) is host.RotatingKVCache and cache.keep == 0
    return int(cache.max_size) if rotates else 0


def windows(model: nn.Module) -> list[int]:
    """The window of each of the model's caches, 0 where it has none."""
    return [window(cache) for cache in hook.host_caches(model)]


def _why_kept(cache: object) -> str:
    of_classes = (why for kind, why in _OF_CACHES if isinstance(cache, kind))
    return next(of_classes, f"a cache of its own ({type(cache).__name__})")


def plain_attention(model: nn.Module) -> list[Shape | None]:
    """The shape of each of the model's caches, None where it cannot be replaced."""
    return [found if isinstance(found, tuple) else None for found in attention(model)]


def kept(model: nn.Module) -> dict[str, int]:
    """Why caches of a model stay mlx_lm's own, and how many for each reason."""
    return dict(Counter(found for found in attention(model) if isinstance(found, str)))
