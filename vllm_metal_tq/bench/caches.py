"""The caches that are compared: mlx_lm's own, dense and quantised, and ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
from mlx.utils import tree_flatten

from ..config import TurboQuantConfig
from ..integrations.mlx_lm import make_prompt_cache
from ..integrations.mlx_lm.hook import host_caches
from ..plan import plan
from ..plan.caches import MLX_GROUP

MLX_BITS = {scheme.name: scheme.mlx_bits for scheme in plan.BASELINES if scheme.mlx_bits}
BASELINES = tuple(scheme.name for scheme in plan.BASELINES)
DENSE = BASELINES[0]

Maker = Callable[[nn.Module], list[Any]]
"""Makes an empty prompt cache of a model."""


def maker(name: str, config: TurboQuantConfig | None = None, calibration: Any = None) -> Maker:
    """What makes the cache of that name: one of ``BASELINES``, or else ours.

    Args:
        name: of the cache.
        config: widths of ours.
        calibration: of the model, for ours.
    """
    if name == DENSE:
        return host_caches
    if name in MLX_BITS:
        return partial(_quantised, bits=MLX_BITS[name])
    return partial(make_prompt_cache, config=config, calibration=calibration)


def arrays(tree: Any) -> list[mx.array]:
    """All arrays in a tree, such as a model's parameters or a cache's state."""
    leaves = dict(tree_flatten(tree)).values()
    return [leaf for leaf in leaves if isinstance(leaf, mx.array)]


def bits_per_element(name: str) -> float:
    """Bits that an element takes in one of ``BASELINES``, scales included."""
    return 16 if name == DENSE else MLX_BITS[name] + 32 / MLX_GROUP


def _quantised(model: nn.Module, bits: int) -> list[Any]:
    """Mlx_lm's quantised caches where its layers can have one, as its ``--kv-bits`` does."""
    return [
        cache.to_quantized(MLX_GROUP, bits) if type(cache) is host.KVCache else cache
        for cache in host_caches(model)
    ]
