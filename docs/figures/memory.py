"""What a long prompt needs at its peak: the table of ``performance.md``."""

import re

from style import BLUE, HERE, INK, pyplot, save


def rows() -> list[list[float]]:
    """Tokens, then MiB: uncompressed cache, its peak, tq4 cache, its peak, the goal."""
    page = (HERE.parent / "performance.md").read_text(encoding="utf-8")
    table = page.split("| tokens | uncompressed cache, MiB |")[1].split("\n\n")[0]
    lines = re.findall(r"^\| ([\d,]+ (?:\| [\d.]+ )+)\|$", table, re.MULTILINE)
    return [[float(cell.replace(",", "")) for cell in line.split("|")] for line in lines]


def draw(folder=HERE):
    """Write ``memory.svg``."""
    tokens, cache, peak, our_cache, our_peak, _ = zip(*rows(), strict=True)
    figure, ax = pyplot.subplots()
    ax.plot(tokens, peak, "o-", color=INK, label="uncompressed: peak")
    ax.plot(tokens, cache, "s:", color=INK, label="its cache")
    ax.plot(tokens, our_peak, "o-", color=BLUE, label="tq4: peak")
    ax.plot(tokens, our_cache, "s:", color=BLUE, label="its cache")
    ax.set_xlabel("tokens of the prompt")
    ax.set_ylabel("MiB above the weights")
    ax.set_xticks(tokens, [f"{count:,.0f}" for count in tokens])
    ax.set_ylim(0)
    ax.grid(alpha=0.3)
    ax.legend()
    save(figure, "memory", folder)


if __name__ == "__main__":
    draw()
