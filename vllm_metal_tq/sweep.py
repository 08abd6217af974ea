"""What points of quality against bits say: the Pareto frontier, a table, a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from .config import T2, T3
from .evaluate import OURS, Method, Quality
from .evaluate import measure as measure_quality
from .types import Progress

PAIRS = (
    *((T2, T2), (T3, T2), (T3, T3), (4, T2), (4, T3), (4, 4), (5, 4), (5, 5), (6, 4), (6, 5)),
    *((6, 6), (8, T3), (8, 4), (8, 5), (8, 6), (8, 8)),
    *((2, 2), (3, 3)),
)
"""Widths of keys and values of a sweep: the presets, what lies between them, and scalar codes."""


@dataclass(frozen=True)
class Point:
    """What was measured of a method; the quality's ``bits_per_element`` are the method's."""

    family: str
    name: str
    quality: Quality

    @property
    def bits(self) -> float:
        """Bits of an element of K or V in a full window, everything that is stored included."""
        return self.quality.bits_per_element

    @property
    def kl(self) -> float:
        """Mean KL divergence from the uncompressed run, in nats."""
        return self.quality.kl_mean

    def fields(self) -> dict[str, Any]:
        """The point as JSON states it."""
        figures = asdict(self.quality) | {"dppl_percent": self.quality.dppl_percent}
        return {"family": self.family, "name": self.name} | figures


def measure(
    model: nn.Module,
    token_ids: list[int],
    methods: Sequence[Method],
    *,
    window: int = 1024,
    tokens: int = 1024,
    progress: Progress = lambda done, total: None,
) -> list[Point]:
    """Measure every method on a text; arguments and errors are those of ``evaluate.measure``."""
    found = measure_quality(
        model, token_ids, methods, window=window, tokens=tokens, progress=progress
    )
    return [
        Point(method.family, method.name, quality)
        for method, quality in zip(methods, found, strict=True)
    ]


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both bits and KL, by rising bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def best_within(points: Iterable[Point], bits: float) -> Point | None:
    """The point of least KL that takes at most so many bits, or None."""
    return min((p for p in points if p.bits <= bits), key=lambda point: point.kl, default=None)


def rows(points: Sequence[Point]) -> list[list[str]]:
    """A table's cells by rising bits: name, bits, KL twice, perplexity, top-1, on the frontier."""
    best = frontier(points)
    return [
        [
            point.name,
            f"{point.bits:.2f}",
            f"{point.kl:.5f}",
            f"{point.quality.kl_p99:.4f}",
            f"{point.quality.dppl_percent:+.2f} %",
            f"{100 * point.quality.top1:.1f} %",
            "yes" if point in best else "",
        ]
        for point in sorted(points, key=lambda point: (point.bits, point.kl))
    ]


def markdown(points: Sequence[Point]) -> str:
    """The same as a Markdown table."""
    lines = [
        "| cache | bits | KL mean | KL p99 | perplexity | top-1 | on the frontier |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in rows(points)),
    ]
    return "\n".join(lines) + "\n"


def why_not_draw() -> str | None:
    """What ``draw`` lacks, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "a plot needs matplotlib: pip install 'vllm-metal-tq[plot]'"
    return None


def draw(points: Sequence[Point], file: str, title: str) -> None:
    """Draw KL against bits, a line through each family's frontier; ours is the bold one.

    Raises:
        ValueError: matplotlib is missing.
    """
    if missing := why_not_draw():
        raise ValueError(missing)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for family in dict.fromkeys(point.family for point in points):
        members = [point for point in points if point.family == family]
        ours = family == OURS
        (line,) = axes.plot(
            [point.bits for point in frontier(members)],
            [point.kl for point in frontier(members)],
            linewidth=2.5 if ours else 1,
            color="black" if ours else None,
            zorder=3 if ours else 2,
        )
        axes.scatter(
            [point.bits for point in members],
            [point.kl for point in members],
            s=36 if ours else 16,
            color=line.get_color(),
            label=family,
            zorder=3 if ours else 2,
        )
        for point in frontier(members) if ours else ():
            axes.annotate(
                point.name,
                (point.bits, point.kl),
                xytext=(-4, -9),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
    axes.set(
        yscale="log",
        xlabel="bits of an element of K or V, everything included",
        ylabel="mean KL divergence from the uncompressed cache, nats",
        title=title,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=100)
