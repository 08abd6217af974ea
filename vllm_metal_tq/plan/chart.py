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
    longest = {row.scheme.name: row.max_context for row in plan.rows if row.max_context is not None}
    ours = {row.scheme.name for row in plan.rows if row.ours}
    figure = Figure(figsize=(9, 1 + 0.45 * len(longest)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(
        list(longest),
        list(longest.values()),
        color=[OURS if name in ours else THEIRS for name in longest],
    )
    axes.bar_label(bars, labels=[f"{tokens:,}" for tokens in longest.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="longest context that fits, tokens", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=100)
