"""Which layers of a model are plain attention, found by watching them use their caches."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host

from . import hook


class _Probe(host.KVCache):
    """A dense cache that records how a layer uses it."""

    def __init__(self):
        super().__init__()
        self.updates: list[tuple] = []
        self.attentions: list[tuple] = []

    def update_and_fetch(self, keys, values):
        self.updates.append((keys.shape, values.shape))
        return super().update_and_fetch(keys, values)

    def attend(self, queries, keys, values, scale, mask, sinks):
        self.attentions.append((queries.shape, keys.shape, values.shape))
        return hook.dense_attention(queries, keys, values, None, scale, mask, sinks)

    def shape(self) -> tuple[int, int] | None:
        """(head_dim, num_kv_heads) where the layer is plain attention, else None."""
        if len(self.updates) != 1 or len(self.attentions) != 1:
            return None
        (stored, stored_values), (queries, keys, values) = self.updates[0], self.attentions[0]
        if not stored == stored_values == keys == values or queries[3] != keys[3]:
            return None
        return keys[3], keys[1]


def plain_attention(model: nn.Module) -> list[tuple[int, int] | None]:
    """(head_dim, num_kv_heads) of each of the model's caches, None where it cannot be replaced.

    Found by building the graph of one token and never evaluating it: a layer qualifies if it
    stores keys and values of one shape once and attends to them once. The hook must be installed.
    """
    caches = host.make_prompt_cache(model)
    probes = [_Probe() if type(cache) is host.KVCache else cache for cache in caches]
    model(mx.zeros((1, 1), mx.int32), cache=probes)
    return [probe.shape() if isinstance(probe, _Probe) else None for probe in probes]
