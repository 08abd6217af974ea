"""Prompt caches: a list of caches, one a layer, as ``mlx_lm.generate`` takes it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from ...calibration import Calibration
from ...config import TurboQuantConfig
from ...types import PromptCache
from .cache import TurboQuantKVCache
from .parts import all_compressed, parts
from .pools import CachePools


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


def report(prompt_cache: PromptCache) -> CacheReport:
    """Add up what ``prompt_cache`` holds; pools that it shares with others count whole."""
    ours = all_compressed(prompt_cache)
    every = [part for cache in prompt_cache for part in parts(cache)]
    dense = sum(c.nbytes for c in every if not isinstance(c, TurboQuantKVCache))
    pools = {c.pool for c in ours}
    return CacheReport(
        layers=len(prompt_cache),
        layers_compressed=len(ours),
        kv_bytes=dense + sum(x.nbytes for x in pools) + sum(c.sequences.tail.nbytes for c in ours),
        kv_bytes_bf16=dense + sum(pool.nbytes_bf16 for pool in pools),
    )


def make_prompt_cache(
    model: nn.Module,
    config: TurboQuantConfig | None = None,
    max_kv_size: int | None = None,
    calibration: Calibration | None = None,
) -> PromptCache:
    """Make a prompt cache for ``mlx_lm.generate``, ``stream_generate`` and chat.

    It has pools of its own, which go with it; those of ``CachePools`` share theirs.

    Args:
        model: a model that mlx_lm has loaded.
        config: widths; where None those of the calibration, if it has any, or else the default
            preset.
        max_kv_size: tokens that a layer keeps; None: all.
        calibration: what ``calibrate`` measured; None: the bias of k_proj serves where there is
            one.

    Returns:
        A cache for each layer: a ``TurboQuantKVCache``, or what mlx_lm gives layers that are not
        compressed.

    Raises:
        ValueError: as for ``CachePools``.
    """
    pools = CachePools(model, config, max_kv_size=max_kv_size, calibration=calibration)
    return pools.make_prompt_cache()
