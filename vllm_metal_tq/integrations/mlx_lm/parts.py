"""A layer's cache, or where that is a list of several, the one among them for keys and values."""

from __future__ import annotations

from typing import Any

import mlx_lm.models.cache as host

from ...types import PromptCache
from .cache import TurboQuantKVCache


def parts(cache: Any) -> tuple[Any, ...]:
    """The caches of one layer."""
    return tuple(cache.caches) if isinstance(cache, host.CacheList) else (cache,)


def with_keys(cache: Any, new: Any) -> Any:
    """The caches of one layer, with ``new`` in the place of the one for keys and values."""
    if not isinstance(cache, host.CacheList):
        return new
    return host.CacheList(*(p if isinstance(p, host.ArraysCache) else new for p in cache.caches))


def compressed(cache: Any) -> TurboQuantKVCache | None:
    """The compressed cache of one layer, or None."""
    ours = (part for part in parts(cache) if isinstance(part, TurboQuantKVCache))
    return next(ours, None)


def all_compressed(prompt_cache: PromptCache) -> list[TurboQuantKVCache]:
    """The compressed caches of a prompt cache, in order."""
    return [ours for cache in prompt_cache if (ours := compressed(cache)) is not None]
