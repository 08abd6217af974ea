"""Which layers of a model are plain attention, found by watching them use their caches."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host

from . import hook


class _Probe(host.KVCache):
    """A dense cache that records what a layer fetches from it and what it attends to."""

    def __init__(self):
        super().__init__()
        self.fetched: list[tuple] = []
        self.attended: list[tuple] = []

    def update_and_fetch(self, keys, values):
        self.fetched.append(super().update_and_fetch(keys, values))
        return self.fetched[-1]

    def attend(self, queries, keys, values, scale, mask, sinks):
        self.attended.append((queries, keys, values))
        return hook.dense_attention(queries, keys, values, None, scale, mask, sinks)

    def shape(self) -> tuple[int, int] | None:
        """(head_dim, num_kv_heads) where the layer is plain attention, else None."""
        if len(self.fetched) != 1 or len(self.attended) != 1:
            return None
        queries, keys, values = self.attended[0]
        untouched = keys is self.fetched[0][0] and values is self.fetched[0][1]
        if not untouched or not queries.shape[3] == keys.shape[3] == values.shape[3]:
            return None
        return keys.shape[3], keys.shape[1]


def plain_attention(model: nn.Module) -> list[tuple[int, int] | None]:
    """(head_dim, num_kv_heads) of each of the model's caches, None where it cannot be replaced.

    Found by building the graph of one token and never evaluating it: a layer qualifies if it
    stores keys and values of one head_dim once and attends once to what it fetched, as it is.
    The hook must be installed.
    """
    caches = hook.host_caches(model)
    probes = [_Probe() if type(cache) is host.KVCache else cache for cache in caches]
    model(mx.zeros((1, 1), mx.int32), cache=probes)
    return [probe.shape() if isinstance(probe, _Probe) else None for probe in probes]
