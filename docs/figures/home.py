"""The 30-second picture: what fits into 1 GiB, and what it costs.

Tokens follow from ``PageLayout``; the cost is the table of presets in ``quality.md``.
"""

import re

import numpy as np
from style import BLUE, GREEN, HERE, INK, pyplot, save

from vllm_metal_tq.config import PRESETS, TurboQuantConfig
from vllm_metal_tq.layout import PageLayout

LAYERS, KV_HEADS, HEAD_DIM = 16, 8, 64  # Llama-3.2-1B


def tokens() -> dict[str, int]:
    """Tokens whose keys and values 1 GiB holds, in whole blocks."""
    layouts = {name: PageLayout(TurboQuantConfig.from_names(name), HEAD_DIM) for name in PRESETS}
    pages = {name: layout.page_bytes for name, layout in layouts.items()}
    pages = {"bf16": layouts["tq4"].bf16_page_bytes} | pages
    return {name: 16 * (2**30 // (LAYERS * KV_HEADS * size)) for name, size in pages.items()}


def divergence() -> dict[str, str]:
    """Mean KL divergence of each preset, in nats, as ``quality.md`` has it."""
    page = (HERE.parent / "quality.md").read_text(encoding="utf-8")
    return {
        name: re.search(rf"^\| {name} \|(?:[^|]*\|){{2}} ([\d.]+)", page, re.MULTILINE)[1]
        for name in PRESETS
    }


def draw(folder=HERE):
    """Write ``home.svg``."""
    fit, cost = tokens(), divergence()
    rows = np.arange(len(fit))
    figure, (left, right) = pyplot.subplots(1, 2, sharey=True, width_ratios=(5, 3))
    bars = left.barh(rows, list(fit.values()), color=[INK] + [BLUE] * len(cost))
    ratios = [f"{count:,}  ({count / fit['bf16']:.1f}x)" for count in fit.values()]
    left.bar_label(bars, ratios, padding=4, color=INK)
    left.set_xlim(0, 1.6 * max(fit.values()))
    left.set_title("tokens in 1 GiB, Llama-3.2-1B")
    left.set_xticks([])
    left.spines.bottom.set_visible(False)
    left.set_yticks(rows, list(fit))
    left.invert_yaxis()
    for row, value in zip(rows[1:], cost.values(), strict=True):
        right.plot(float(value), row, "o", color=GREEN, markersize=6)
        right.annotate(value, (float(value), row), (6, -4), textcoords="offset points", color=INK)
    right.set_xscale("log")
    right.set_xlim(2e-5, 2)
    right.set_title("KL, demo model")
    right.tick_params(left=False)
    right.grid(axis="x", alpha=0.3)
    save(figure, "home", folder)


if __name__ == "__main__":
    draw()
