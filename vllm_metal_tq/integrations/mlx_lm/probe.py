"""Which layers of a model are plain attention, found by watching them use their caches."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host

from ...attention import Mask
from . import hook


class _Probe(host.KVCache):
    """A dense cache that records what its layer fetches from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[tuple[mx.array, mx.array]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.fetched.append(super().update_and_fetch(keys, values))
        return self.fetched[-1]

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

    def shape(self, attended: list[hook.Attended]) -> tuple[int, int] | None:
        """(head_dim, num_kv_heads) where the layer is plain attention, else None."""
        if len(self.fetched) != 1:
            return None
        keys, values = self.fetched[0]
        readers = [
            (queries, cache is self and read_keys is keys and read_values is values)
            for queries, read_keys, read_values, cache in attended
            if cache is self or read_keys is keys or read_values is values
        ]
        if len(readers) != 1:
            return None
        queries, untouched = readers[0]
        if not untouched or not queries.shape[3] == keys.shape[3] == values.shape[3]:
            return None
        return keys.shape[3], keys.shape[1]


def plain_attention(model: nn.Module) -> list[tuple[int, int] | None]:
    """(head_dim, num_kv_heads) of each of the model's caches, None where it cannot be replaced.

    Found by building the graph of one token and never evaluating it: a layer qualifies if it
    stores keys and values of one head_dim once and they are attended to once, as they are, by
    itself: a layer that reads another's keys knows the newest of them only.
    The hook must be installed.
    """
    caches = hook.host_caches(model)
    probes = [_Probe() if type(cache) is host.KVCache else cache for cache in caches]
    with hook.watched() as attended:
        model(mx.zeros((1, 1), mx.int32), cache=probes)
    return [probe.shape(attended) if isinstance(probe, _Probe) else None for probe in probes]
