"""Prompt caches: a list of caches, one a layer, as ``mlx_lm.generate`` takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
from mlx.utils import tree_flatten

from ...config import TurboQuantConfig
from . import hook
from .cache import TurboQuantKVCache
from .probe import plain_attention


@dataclass(frozen=True)
class CacheReport:
    """What a prompt cache holds.

    Attributes:
        layers: caches in the prompt cache.
        layers_compressed: how many of them are compressed.
        kv_bytes: bytes allocated, the other caches included.
        kv_bytes_bf16: the same with bf16 in place of the compressed caches.
    """

    layers: int
    layers_compressed: int
    kv_bytes: int
    kv_bytes_bf16: int

    @property
    def ratio(self) -> float:
        """How many times smaller the cache is than with bf16."""
        return self.kv_bytes_bf16 / self.kv_bytes if self.kv_bytes else 1.0


def report(prompt_cache: list) -> CacheReport:
    """Add up what ``prompt_cache`` holds."""
    ours = [c for c in prompt_cache if isinstance(c, TurboQuantKVCache)]
    others = [c for c in prompt_cache if not isinstance(c, TurboQuantKVCache)]
    arrays = (x for c in others for _, x in tree_flatten(c.state) if isinstance(x, mx.array))
    dense = sum(x.nbytes for x in arrays)
    return CacheReport(
        layers=len(prompt_cache),
        layers_compressed=len(ours),
        kv_bytes=dense + sum(c.nbytes for c in ours),
        kv_bytes_bf16=dense + sum(c.nbytes_bf16 for c in ours),
    )


def make_prompt_cache(
    model: nn.Module,
    config: TurboQuantConfig | None = None,
    max_kv_size: int | None = None,
) -> list:
    """Make a prompt cache for ``mlx_lm.generate``, ``stream_generate`` and chat.

    Layers of plain attention get a ``TurboQuantKVCache``; the others (sliding window, SSM, MLA,
    layers that share their keys) keep the cache that mlx_lm gives them.

    Args:
        model: a model that mlx_lm has loaded.
        config: widths; ``TurboQuantConfig.from_names()``, the default preset, where None.
        max_kv_size: tokens that a layer keeps, as mlx_lm's flag of that name: beyond it the
            oldest blocks but the first are dropped.

    Raises:
        ValueError: a head_dim cannot be rotated, or ``max_kv_size`` is below two blocks.
    """
    config = config or TurboQuantConfig.from_names()
    hook.install(model)
    caches = host.make_prompt_cache(model, max_kv_size)
    return [
        cache if shape is None else TurboQuantKVCache(config, *shape, max_tokens=max_kv_size)
        for cache, shape in zip(caches, plain_attention(model), strict=True)
    ]


def save_prompt_cache(file_name: str, prompt_cache: list, metadata: dict | None = None) -> None:
    """Save ``prompt_cache`` with ``metadata`` (strings), as ``mlx_lm.models.cache`` does."""
    host.save_prompt_cache(str(file_name), prompt_cache, metadata or {})


def load_prompt_cache(file_name: str, model: nn.Module) -> list:
    """Load what ``save_prompt_cache`` wrote, for use with ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no prompt cache, or belongs to another model.
    """
    if not Path(file_name).is_file():
        raise FileNotFoundError(f"prompt cache {str(file_name)!r}: no such file")
    hook.install(model)
    try:
        prompt_cache = host.load_prompt_cache(str(file_name))
        mx.eval([cache.state for cache in prompt_cache])  # reads the file to its end
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"prompt cache {str(file_name)!r} is damaged or foreign: {e}") from e
    expected = [_signature(cache) for cache in make_prompt_cache(model)]
    if [_signature(cache) for cache in prompt_cache] != expected:
        raise ValueError(f"prompt cache {str(file_name)!r} was made by another model")
    return prompt_cache


def _signature(cache) -> tuple:
    if isinstance(cache, TurboQuantKVCache):
        return (cache.layout.head_dim, cache.pool.num_kv_heads)
    return (type(cache).__name__,)
