"""Compressed caches for layers whose keys are read in another way than once, by mlx_lm's function.

``SharedKVCache`` serves layers whose keys and values others read as well: it hands out arrays that
stand for them, by which every reader's attention finds the cache. ``FetchedKVCache`` serves
attention of the model's own: it hands out keys and values of all tokens, restored.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import mlx.core as mx

from ...attention import Mask
from .cache import BatchTurboQuantKVCache, TurboQuantKVCache

Pair = tuple[mx.array, mx.array]
"""Keys and values."""

_owners: WeakValueDictionary[int, SharedKVCache] = WeakValueDictionary()
"""Whose stand-ins are handed out, by the id of those for keys."""


def owner(keys: mx.array, values: mx.array) -> TurboQuantKVCache | None:
    """The cache for whose tokens these arrays stand, or None where they are what they seem."""
    cache = _owners.get(id(keys))
    return cache if cache is not None and cache.handed_out(keys, values) else None


class SharedKVCache(TurboQuantKVCache):
    """The compressed cache of a layer whose keys and values other layers read too.

    Nothing is stored twice, and every reader attends to the pages. What is handed out are
    stand-ins: of the shape that all tokens would have, NaN in every element, and no memory.
    Whatever reads them other than through mlx_lm's attention function shows NaN, instead of a
    context of which most is missing. The last chunk is held as it came until the next, because
    readers to come see it so.
    """

    _chunk: Pair | None = None
    _stand_ins: Pair | None = None

    def __deepcopy__(self, memo: object) -> TurboQuantKVCache:
        other = super().__deepcopy__(memo)
        assert isinstance(other, SharedKVCache)
        other._chunk = other._stand_ins = None
        return other

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """Store a chunk, and return what stands for all tokens seen.

        Args:
            keys: ``(B, num_kv_heads, L, head_dim)``.
            values: ``(B, num_kv_heads, L, v_head_dim)``.

        Returns:
            ``(B, num_kv_heads, S, head_dim)`` and ``(B, num_kv_heads, S, v_head_dim)`` of NaN,
            which ``scaled_dot_product_attention`` takes for the S tokens seen.

        Raises:
            ValueError: as for ``TurboQuantKVCache``.
            OutOfBlocks: likewise.
        """
        self._chunk = super().update_and_fetch(keys, values)
        if self._stand_ins:
            _owners.pop(id(self._stand_ins[0]), None)
        seen = max(self.sequences.offsets)
        self._stand_ins = _stand_in(keys, seen), _stand_in(values, seen)
        _owners[id(self._stand_ins[0])] = self
        return self._stand_ins

    def keys_and_values(self) -> Pair:
        """What ``update_and_fetch`` returned last, for layers that read this one's cache."""
        if self._stand_ins is None:
            raise RuntimeError("no keys were stored since this cache was made, loaded or copied")
        return self._stand_ins

    def handed_out(self, keys: mx.array, values: mx.array) -> bool:
        """Whether these very arrays stand for this cache's tokens."""
        return self._stand_ins is not None and (
            self._stand_ins[0] is keys and self._stand_ins[1] is values
        )

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """As ``TurboQuantKVCache`` has it; keys and values are what was handed out."""
        assert self._chunk
        return super().attend(queries, *self._chunk, scale, mask, sinks)

    def extract(self, idx: int) -> SharedKVCache:
        """One sequence, as a cache of its own that shares the blocks."""
        return SharedKVCache.of(self.sequences.take([idx]))

    @staticmethod
    def merge(caches: list[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """See ``TurboQuantKVCache``."""
        return BatchSharedKVCache.of(TurboQuantKVCache.merge(caches).sequences)


class BatchSharedKVCache(SharedKVCache, BatchTurboQuantKVCache):
    """Sequences of such a layer that join and leave at any step."""


class FetchedKVCache(TurboQuantKVCache):
    """The compressed cache of a layer whose keys the model reads with code of its own.

    ``update_and_fetch`` restores all that it holds, so that each step makes one layer's keys and
    values anew in the model's dtype: slower than attending to pages, and for one layer at a time
    as large as the uncompressed cache. It holds sequences of one length, so it cannot be batched.
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Pair:
        """Store a chunk, and return keys and values of all tokens.

        Args:
            keys: ``(B, num_kv_heads, L, head_dim)``.
            values: ``(B, num_kv_heads, L, v_head_dim)``.

        Returns:
            ``(B, num_kv_heads, S, head_dim)`` and ``(B, num_kv_heads, S, v_head_dim)`` of the S
            tokens stored, in the chunk's dtype: recent ones as they came, others from the pages.

        Raises:
            ValueError: as for ``TurboQuantKVCache``.
            OutOfBlocks: likewise.
        """
        chunk = super().update_and_fetch(keys, values)
        return self.sequences.restored(*chunk)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend to what the model made of the keys and values that it got."""
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )

    @property
    def merge(self) -> Callable[..., BatchTurboQuantKVCache]:  # type: ignore[override]
        """Never there, by which mlx_lm knows what cannot be batched."""
        raise AttributeError("a FetchedKVCache cannot be batched")

    def extract(self, idx: int) -> FetchedKVCache:
        """One sequence, as a cache of its own that shares the blocks."""
        return FetchedKVCache.of(self.sequences.take([idx]))


def _stand_in(new: mx.array, length: int) -> mx.array:
    batch, heads, _, dim = new.shape
    nan = mx.array(float("nan"), new.dtype)
    return mx.broadcast_to(nan, (batch, heads, length, dim))
