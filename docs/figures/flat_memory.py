"""What a server holds while it serves random traffic: the samples that ``make soak`` took."""

import csv
from pathlib import Path

from style import BLUE, GREEN, HERE, INK, ORANGE, pyplot, save

MB = 1e6


def samples(file: Path) -> dict[str, list[float]]:
    """The columns of a file that ``benchmarks/soak.py`` wrote."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw(folder=HERE, file=HERE / "soak.csv"):
    """Write ``flat_memory.svg``."""
    of = samples(file)
    minutes = [seconds / 60 for seconds in of["seconds"]]
    figure, (memory, blocks) = pyplot.subplots(2, sharex=True, figsize=(7.2, 4.6))
    lines = (
        ("rss_bytes", "process (RSS)", BLUE),
        ("mlx_active_bytes", "MLX arrays", ORANGE),
        ("mlx_cache_bytes", "kept by MLX for new ones", INK),
    )
    for name, label, colour in lines:
        memory.plot(minutes, [x / MB for x in of[name]], color=colour, linewidth=1, label=label)
    memory.set(ylabel="MB", ylim=(0, None))
    lines = (
        ("kv_blocks_used", "blocks in use", GREEN),
        ("prompt_cache_sequences", "prompts kept", INK),
    )
    for name, label, colour in lines:
        blocks.plot(minutes, of[name], color=colour, linewidth=0.8, label=label)
    blocks.set(ylabel="count", ylim=(0, None), xlabel="minutes")
    for ax in (memory, blocks):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "flat_memory", folder)


if __name__ == "__main__":
    draw()
