"""Prompt caches: a list of caches, one a layer, as ``mlx_lm.generate`` takes it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
import mlx_lm.models.cache as host

from ...calibration import Calibration
from ...centre import Centre
from ...config import TurboQuantConfig
from . import hook
from .cache import TurboQuantKVCache
from .measure import from_biases
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
    dense = sum(c.nbytes for c in others)
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
    calibration: Calibration | None = None,
) -> list:
    """Make a prompt cache for ``mlx_lm.generate``, ``stream_generate`` and chat.

    Layers of plain attention get a ``TurboQuantKVCache``; the others (sliding window, SSM, MLA,
    layers that share their keys) keep the cache that mlx_lm gives them.

    Args:
        model: a model that mlx_lm has loaded.
        config: widths; where None those of the calibration, if it has any, or else the default
            preset.
        max_kv_size: tokens that a layer keeps, as mlx_lm's flag of that name: beyond it the
            oldest blocks but the first are dropped.
        calibration: what ``calibrate`` measured or ``calibration.load`` read. None: the bias of
            k_proj serves where a layer has one.

    Raises:
        ValueError: a head_dim cannot be rotated, ``max_kv_size`` is below two blocks, the
            calibration is of a model of another shape, or the config names a layer that is not
            there.
    """
    config = config or (calibration and calibration.config) or TurboQuantConfig.from_names()
    hook.install(model)
    caches, shapes = host.make_prompt_cache(model, max_kv_size), plain_attention(model)
    centres = (calibration or from_biases(model)).centres
    if len(centres) != len(shapes) or not all(map(_fits, centres, shapes)):
        raise ValueError("the calibration was measured on a model of another shape")
    beyond = [last for _, last, *_ in config.layer_overrides if last >= len(shapes)]
    if beyond:
        raise ValueError(f"there is no layer {beyond[0]}: the model has {len(shapes)}")
    made = []
    for layer, (cache, shape, centre) in enumerate(zip(caches, shapes, centres, strict=True)):
        if shape is not None:
            own = config.for_layer(layer)
            cache = TurboQuantKVCache(own, *shape, max_kv_size=max_kv_size, centre=centre)
        made.append(cache)
    return made


def _fits(centre: Centre | None, shape: tuple[int, int] | None) -> bool:
    return centre is None or (shape is not None and centre.mu.shape == shape[::-1])
