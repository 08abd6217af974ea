"""What a page is: which token's which bits lie in each of its bytes, as ``PageLayout`` says."""

import numpy as np
from style import BLUE, GREEN, HERE, INK, ORANGE, RED, pyplot, save

from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.layout import PageLayout

COLOURS = {"key, low bits": BLUE, "key, high bit": ORANGE, "value, low bits": GREEN}
COLOURS |= {"value, high bit": RED, "scales": INK}
TOKEN = 5
WIDTH = 100  # bytes a line


def owners(layout: PageLayout) -> tuple[np.ndarray, np.ndarray]:
    """Of each byte of a page its part (planes in order, then scales) and its token."""
    part, token = (np.zeros(layout.page_bytes, int) for _ in range(2))
    ends = np.cumsum([*layout.plane_bytes, 4])
    of_row = np.searchsorted(ends, np.arange(layout.row_bytes), side="right")
    part[layout.byte_offsets] = of_row
    token[layout.byte_offsets] = np.arange(layout.config.block_size)[:, None]
    return part, token


def runs(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the runs of True, none of which goes over the end of a line."""
    number = np.arange(len(chosen))
    begins = chosen & (~np.roll(chosen, 1) | (number % WIDTH == 0))
    starts = number[begins]
    owner = np.cumsum(begins) - 1
    return starts, np.bincount(owner[chosen], minlength=len(starts))


def draw(folder=HERE):
    """Write ``page.svg``."""
    layout = PageLayout(TurboQuantConfig(3, 3), 128)
    part, token = owners(layout)
    figure, ax = pyplot.subplots(figsize=(6.4, 3.2))
    for number, (name, colour) in enumerate(COLOURS.items()):
        for own, alpha in ((False, 0.25), (True, 1.0)):
            chosen = (part == number) & ((token == TOKEN) == own)
            starts, widths = runs(chosen)
            ax.barh(
                starts // WIDTH,
                widths,
                height=0.9,
                left=starts % WIDTH,
                color=colour,
                alpha=alpha,
                label=name if own else None,
                linewidth=0,
            )
    lines = -(-layout.page_bytes // WIDTH)
    ax.set_ylim(lines - 0.4, -0.6)
    ax.set_xlim(0, WIDTH)
    ax.set_yticks(range(0, lines, 3), [f"{WIDTH * line:,}" for line in range(0, lines, 3)])
    ax.set_xlabel("byte")
    ax.set_ylabel("from byte")
    ax.set_title(
        f"q3_0, head_dim 128: {layout.page_bytes:,} bytes, 16 tokens; strong: token {TOKEN}"
    )
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, "page", folder)


if __name__ == "__main__":
    draw()
