"""What ``bench context`` found, as CSV, as Markdown and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

from ..config import PRESETS
from .context import Step

MIB = 2**20


@dataclass
class Run:
    """One cache's steps.

    Attributes:
        cache: its name.
        steps: in order.
        stopped: why there are no more.
    """

    cache: str
    steps: list[Step] = field(default_factory=list)
    stopped: str = ""

    def fields(self) -> list[dict[str, object]]:
        """The steps as JSON and CSV state them."""
        return [{"cache": self.cache} | asdict(step) for step in self.steps]


def write_csv(runs: Sequence[Run], file: str) -> None:
    """Write a line for each step, after a header."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["cache", *(f.name for f in fields(Step))])
        writer.writeheader()
        for run in runs:
            writer.writerows(run.fields())


def markdown(facts: Mapping[str, str], runs: Sequence[Run]) -> str:
    """A report to paste: facts of the machine and the model, where each cache ended, all steps.

    Args:
        facts: names and what they are, a line each.
        runs: of all caches.
    """
    ends = [[run.cache, *_cells(run.steps[-1:]), run.stopped] for run in runs]
    steps = [[run.cache, *_cells([step])] for run in runs for step in run.steps]
    header = ["cache", "tokens", "cache, MiB", "peak, MiB", "RSS, MiB", "prefill tok/s"]
    header.append("decode tok/s")
    return "\n".join(
        [
            *(f"- {name}: {fact}" for name, fact in facts.items()),
            *("", "Where each cache ended:", ""),
            *_table([*header, "what stopped it"], ends),
            *("", "All steps:", ""),
            *_table(header, steps),
        ]
    )


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cells(steps: Sequence[Step]) -> list[str]:
    """Cells of the only step; empty ones where there is none."""
    for step in steps:
        sizes = (step.kv_bytes, step.peak_bytes, step.rss_bytes)
        speeds = (step.prefill_tps, step.decode_tps)
        return [
            f"{step.context:,}",
            *(f"{size / MIB:,.1f}" for size in sizes),
            *(f"{speed:,.1f}" for speed in speeds),
        ]
    return [""] * (len(fields(Step)))


def draw(runs: Sequence[Run], file: str, title: str) -> None:
    """Draw cache, peak, and both speeds over the context; a colour for each cache, theirs dotted.

    Raises:
        ValueError: the file's name ends in what matplotlib does not write.
    """
    from matplotlib.figure import Figure

    panels = {
        "cache, MiB": lambda step: step.kv_bytes / MIB,
        "peak, MiB": lambda step: step.peak_bytes / MIB,
        "prefill, tokens/s": lambda step: step.prefill_tps,
        "decode, tokens/s": lambda step: step.decode_tps,
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (label, value) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for run in runs:
            style = "-" if run.cache in PRESETS else ":"
            lengths = [step.context for step in run.steps]
            axes.plot(lengths, list(map(value, run.steps)), "o" + style, ms=3, label=run.cache)
        axes.set(xlabel="tokens in the cache", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
