"""How mlx_lm's models come to attend through a cache of ours.

Each model module imports ``scaled_dot_product_attention`` by name, so the name is rebound in
every module that holds it. The replacement serves caches that have an ``attend`` of their own
class, and calls the original, with the same arguments, for every other cache. Keys that stand for
the tokens of a ``SharedKVCache`` are served by that one, whatever cache comes with them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.base as base
import mlx_lm.models.cache as host

from ...attention import Mask
from ...types import PromptCache
from .cache import TurboQuantKVCache
from .fetched import FetchedKVCache, SharedKVCache, owner

_NAME = "scaled_dot_product_attention"

Namespace = dict[str, Any]

dense_attention: Callable[..., mx.array] = base.scaled_dot_product_attention
"""mlx_lm's own function, as it was before the hook."""

Attended = tuple[mx.array, mx.array, mx.array, object]
"""Queries, keys and values of an attention, and the cache or None."""

CACHES = {cls.__name__: cls for cls in (TurboQuantKVCache, SharedKVCache, FetchedKVCache)}
"""The classes of compressed caches of one sequence, by name."""

_rebound: dict[int, Namespace] = {}  # by id: a model's file may be no entry of sys.modules
_watchers: ContextVar[tuple[list[Attended], ...]] = ContextVar("watchers", default=())


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: object,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    for seen in _watchers.get():
        seen.append((queries, keys, values, cache))
    reader = owner(keys, values) or cache
    attend: Callable[..., mx.array] | None = getattr(reader, "attend", None)
    if attend is None:
        return dense_attention(queries, keys, values, cache, scale, mask, sinks)
    return attend(queries, keys, values, scale, mask, sinks)


def install(model: nn.Module) -> None:
    """Reach every loaded module, and the model's own where it came from a file.

    Modules imported later take the replacement from ``mlx_lm.models.base``. Doing it again
    changes nothing. mlx_lm's own ``load_prompt_cache`` comes to know the cache classes as well.
    """
    for namespace in [*_loaded(), *_own(model)]:
        if namespace.get(_NAME) is dense_attention:
            namespace[_NAME] = _attention
            _rebound[id(namespace)] = namespace
    vars(host).update(CACHES)


def uninstall() -> None:
    """Put everything back as it was before ``install``."""
    for namespace in [*_loaded(), *_rebound.values()]:
        if namespace.get(_NAME) is _attention:
            namespace[_NAME] = dense_attention
    _rebound.clear()
    for name in CACHES:
        vars(host).pop(name, None)


@contextmanager
def watched() -> Iterator[list[Attended]]:
    """Every attention inside, of this thread."""
    seen: list[Attended] = []
    token = _watchers.set((*_watchers.get(), seen))
    try:
        yield seen
    finally:
        _watchers.reset(token)


def host_caches(model: nn.Module, max_kv_size: int | None = None) -> PromptCache:
    """The caches that mlx_lm itself makes for ``model``, whatever was attached to it."""
    bare = copy.copy(model)  # another thread may be making caches of the attached pools
    vars(bare).pop("make_cache", None)
    caches: PromptCache = host.make_prompt_cache(bare, max_kv_size)
    return caches


def _own(model: nn.Module) -> list[Namespace]:
    classes = {cls for _, module in model.named_modules() for cls in type(module).__mro__}
    methods = [method for cls in classes for method in vars(cls).values()]
    return [method.__globals__ for method in methods if hasattr(method, "__globals__")]


def _loaded() -> list[Namespace]:
    return [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
