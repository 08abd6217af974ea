"""What centring does: a key is mostly a mean that RoPE turns; what is left is short."""

import numpy as np
from step import head
from style import BLUE, GREEN, HERE, ORANGE, pyplot, save

from vllm_metal_tq.centre import TURN


def fast_and_far(one) -> int:
    """The element with the longest mean of those that turn once in 16 to 96 tokens."""
    first, _, step = one.centre.pairs.T
    period = TURN / np.maximum(step, 1)
    chosen = first[(period >= 16) & (period <= 96)]
    return int(chosen[np.abs(one.means)[:, chosen].max(axis=0).argmax()])


def draw(folder=HERE):
    """Write ``centring.svg``."""
    one = head()
    positions = np.arange(len(one.keys))
    means = one.means
    element = fast_and_far(one)
    figure, (left, right) = pyplot.subplots(1, 2)
    left.plot(positions, one.keys[:, element], ".", color=BLUE, label="key $k_j$")
    left.plot(positions, means[:, element], color=ORANGE, label="turned mean $R_jμ$")
    left.set_title(f"element {element} of a key")
    left.set_ylim(top=left.get_ylim()[1] * 1.5)
    left.legend(ncols=2, loc="upper right")
    before, after = (np.square(x).sum(axis=1) for x in (one.keys, one.short_keys))
    right.plot(positions, before, color=BLUE, label="$|k_j|^2$")
    right.plot(positions, after, color=GREEN, label="what is encoded")
    right.set_ylim(bottom=0, top=before.max() * 1.25)
    right.set_title(f"square length: {100 * after.sum() / before.sum():.0f} % is left")
    right.legend(ncols=2, loc="upper right")
    for ax in (left, right):
        ax.set_xlabel("position j")
    save(figure, "centring", folder)


if __name__ == "__main__":
    draw()
