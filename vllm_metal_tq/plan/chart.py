"""The plan as a bar chart."""

from __future__ import annotations

from .plan import Plan

OURS, THEIRS = "#2a7de1", "#9a9a9a"


def draw(plan: Plan, file: str, title: str) -> None:
    """Draw the longest context of each row that has one.

    Raises:
        ValueError: matplotlib is missing, or it writes no such files.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install 'vllm-metal-tq[plot]'") from None
    rows = [row for row in plan.rows if row.cache and row.max_context is not None]
    figure = Figure(figsize=(9, 1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(
        [row.scheme.name for row in rows],
        [row.max_context for row in rows],
        color=[OURS if row.scheme.config else THEIRS for row in rows],
    )
    axes.bar_label(bars, labels=[f"{row.max_context:,}" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="longest context that fits, tokens", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=100)
