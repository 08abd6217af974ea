"""Widths for each layer within a budget of bits, from how much each layer's errors matter.

Each layer's keys, then values, are compressed alone, and the KL divergence is measured. It is about
in proportion to the codes' square error, and divergences of layers about add up, so that one
measurement per half predicts every assignment. Widths then grow from the smallest, always where the
predicted divergence falls most per bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.nn as nn
import mlx_lm.models.cache as host

from .calibration import Calibration
from .codebook import ERRORS
from .config import TurboQuantConfig, bits_of
from .evaluate import Method, as_decoding
from .integrations.mlx_lm import make_prompt_cache
from .integrations.mlx_lm.parts import compressed
from .sweep import measure
from .types import MakeCaches, Progress, PromptCache

PROBED, FINE = 3, 8  # widths of the half that is measured, and of the other

LADDER = tuple(ERRORS)
BITS = [bits_of(width) for width in LADDER]

Halves = tuple[float, float]
"""A figure of a layer's keys and one of its values."""


def sensitivities(
    model: nn.Module,
    token_ids: list[int],
    calibration: Calibration,
    progress: Progress = lambda done, total: None,
) -> list[Halves | None]:
    """KL divergence, in nats, by each layer's keys and values at ``PROBED`` alone.

    Args:
        model: a model that mlx_lm has loaded.
        token_ids: a text; it becomes one window.
        calibration: of this model.
        progress: called with tokens done and tokens in all.

    Returns:
        One for each layer, None where it is not compressed.
    """

    def alone(layer: int, widths: tuple[int, int]) -> MakeCaches:
        def caches(model: nn.Module) -> PromptCache:
            made = host.make_prompt_cache(model)
            config = TurboQuantConfig(*widths)
            made[layer] = make_prompt_cache(model, config, calibration=calibration)[layer]
            return as_decoding(made)

        return caches

    ours = make_prompt_cache(model, calibration=calibration)
    layers = [i for i, cache in enumerate(ours) if compressed(cache)]
    methods = [
        Method("", f"{layer}", 0.0, alone(layer, widths))
        for layer in layers
        for widths in ((PROBED, FINE), (FINE, PROBED))
    ]
    window = len(token_ids) - 1
    points = measure(model, token_ids, methods, window=window, tokens=window, progress=progress)
    figures = iter(point.kl for point in points)
    return [(next(figures), next(figures)) if i in layers else None for i in range(len(ours))]


def check(budget: float, head_dims: Sequence[int | None]) -> float:
    """How many bits are left to spread, summed over the keys' and the values' halves of layers.

    Raises:
        ValueError: no layer is compressed, or the budget is below what the smallest widths take.
    """
    dims = [dim for dim in head_dims if dim is not None]
    if not dims:
        raise ValueError("no layer of this model can be compressed")
    # An element takes its code, and a share of its vector's fp16 scale.
    least = BITS[0] + sum(16 / dim for dim in dims) / len(dims)
    if budget < least:
        raise ValueError(f"{budget} bits are too few: the smallest widths take {least:.2f}")
    return (budget - least) * 2 * len(dims) + 1e-6  # for sums that are off by rounding


def assign(
    found: Sequence[Halves | None], budget: float, head_dims: Sequence[int | None]
) -> TurboQuantConfig:
    """Widths that keep the bits of an element within ``budget`` on average, scales included.

    Args:
        found: what ``sensitivities`` gave.
        budget: bits.
        head_dims: elements of a head vector of each layer, None where it is not compressed.

    Raises:
        ValueError: the budget is below what the smallest widths take.
    """
    left = check(budget, head_dims)
    # Of each layer's keys (0) and values (1): what was found, and the index of the width.
    figures = {(i, half): pair[half] for i, pair in enumerate(found) if pair for half in (0, 1)}
    halves = dict.fromkeys(figures, 0)
    layers = [i for i, pair in enumerate(found) if pair]

    def gain(key: tuple[int, int]) -> float:
        width, wider = LADDER[halves[key] : halves[key] + 2]
        return figures[key] * (ERRORS[width] - ERRORS[wider]) / cost(key)

    def cost(key: tuple[int, int]) -> int:
        return BITS[halves[key] + 1] - BITS[halves[key]]

    while True:
        open_ones = [k for k, i in halves.items() if i + 1 < len(LADDER) and cost(k) <= left]
        if not open_ones:
            break
        best = max(open_ones, key=gain)
        left -= cost(best)
        halves[best] += 1
    own = [(i, i, LADDER[halves[i, 0]], LADDER[halves[i, 1]]) for i in layers]
    return replace(TurboQuantConfig.from_names(), layer_overrides=tuple(own))
