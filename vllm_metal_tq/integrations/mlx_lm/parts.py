"""A layer's cache, or where that is a list of several, the one among them for keys and values."""

from __future__ import annotations

from typing import Any

import mlx_lm.models.cache as host

from ...types import PromptCache
from .cache import TurboQuantKVCache


def parts(cache: Any) -> tuple[Any, ...]:
    """The caches of one layer."""
    return tuple(cache.caches) if isinstance(cache, host.CacheList) else (cache,)


def keys_of(cache: Any) -> Any:
    """Of the caches of one layer, the one for keys and values."""
    return next(part for part in parts(cache) if not isinstance(part, host.ArraysCache))


def with_keys(cache: Any, new: Any) -> Any:
    """The caches of one layer, with ``new`` in the place of the one for keys and values."""
    if not isinstance(cache, host.CacheList):
        return new
    old = keys_of(cache)
    return host.CacheList(*(new if part is old else part for part in cache.caches))


def compressed(cache: Any) -> TurboQuantKVCache | None:
    """The compressed cache of one layer, or None."""
    ours = (part for part in parts(cache) if isinstance(part, TurboQuantKVCache))
    return next(ours, None)


def all_compressed(prompt_cache: PromptCache) -> list[TurboQuantKVCache]:
    """The compressed caches of a prompt cache, in order."""
    return [ours for cache in prompt_cache if (ours := compressed(cache)) is not None]


def batchable(prompt_cache: PromptCache) -> bool:
    """Whether mlx_lm can put prompt caches like this one into a batch.

    Each of its caches must know how. And models make one mask for all layers that attend alike:
    ours say less in theirs than mlx_lm's batches need, so that the two do not go together.
    """
    every = [part for cache in prompt_cache for part in parts(cache)]
    makes = {isinstance(x, TurboQuantKVCache) for x in every if not isinstance(x, host.ArraysCache)}
    return len(makes) <= 1 and all(hasattr(x, "merge") for x in every)
