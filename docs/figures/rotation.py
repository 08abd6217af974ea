"""What the rotation does: elements of keys before and after, beside the normal distribution."""

import numpy as np
from step import head, rotated, standardised
from style import BLUE, GREEN, HERE, INK, pyplot, save


def draw(folder=HERE):
    """Write ``rotation.svg``."""
    figure, axes = pyplot.subplots(1, 2, sharey=True)
    keys = head().keys
    x = np.linspace(-5, 5, 201)
    for ax, part, colour, title in (
        (axes[0], keys, BLUE, "keys as the model makes them"),
        (axes[1], rotated(keys), GREEN, "rotated"),
    ):
        elements = standardised(part)
        ax.hist(elements, bins=np.linspace(-5, 5, 81), density=True, color=colour, alpha=0.7)
        ax.plot(x, np.exp(-x * x / 2) / np.sqrt(2 * np.pi), color=INK, label="normal")
        beyond = 100 * np.mean(np.abs(elements) > 4)
        ax.set_title(title)
        spread = f"beyond ±4: {beyond:.1f} %\nlargest: {np.abs(elements).max():.1f}"
        ax.text(1.0, 0.72, spread, ha="right", va="top", transform=ax.transAxes)
        ax.set_xlabel("element / RMS of its key")
    axes[0].set_ylabel("density")
    axes[0].legend(loc="upper left")
    save(figure, "rotation", folder)


if __name__ == "__main__":
    draw()
