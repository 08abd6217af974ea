"""What all figures have in common: they read on a light and on a dark page, and never change."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

HERE = Path(__file__).parent
INK = "#808080"  # reads on white and on black
BLUE, ORANGE, GREEN, RED = "#3b8ede", "#e08a1e", "#2fa36b", "#d6504e"

pyplot.rcParams.update(
    {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.figsize": (6.4, 2.9),
        "font.size": 10,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "savefig.transparent": True,
        "svg.fonttype": "none",  # text stays text: small, and found by a search
        "svg.hashsalt": "vllm-metal-tq",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
    }
)


def save(figure, name: str, folder: Path = HERE) -> None:
    """Write ``folder/name.svg`` without a date, so that equal data gives equal bytes."""
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
