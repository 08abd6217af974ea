"""What a code is: the cells of 4-bit keys and values over the elements that fall into them."""

import mlx.core as mx
import numpy as np
from step import head, rotated
from style import BLUE, GREEN, HERE, INK, pyplot, save

from vllm_metal_tq.codebook import key_codebook, value_codebook
from vllm_metal_tq.codec import encode_keys, encode_values

BITS = 4


def draw(folder=HERE):
    """Write ``cells.svg``."""
    one = head()
    figure, axes = pyplot.subplots(1, 2)
    keys = one.short_keys * np.array(one.centre.smoothing)
    values = one.values - np.array(one.centre.value_mean)
    for ax, part, encode, codebook, colour, title in (
        (axes[0], keys, encode_keys, key_codebook(BITS), BLUE, "keys: even levels"),
        (axes[1], values, encode_values, value_codebook(BITS), GREEN, "values: as Lloyd-Max"),
    ):
        y = mx.array(rotated(part))
        _, scales = encode(y, BITS)
        elements = np.array(y / scales.astype(mx.float32)[:, None]).ravel()
        levels = np.array(codebook.levels(mx.arange(2**BITS).astype(mx.uint8)))
        end = 1.25 * levels[-1]
        ax.hist(elements, bins=np.linspace(-end, end, 101), density=True, color=colour, alpha=0.6)
        ax.set_xlabel("element / scale of its vector")
        ax.set_yticks([])
        stairs = ax.twinx()
        x = mx.linspace(-end, end, 2001)
        stairs.plot(np.array(x), np.array(codebook.levels(codebook.codes(x))), color=INK)
        stairs.set_ylabel("level")
        stairs.spines.right.set_visible(True)
        ax.set_title(f"{title}, {BITS} bits")
    save(figure, "cells", folder)


if __name__ == "__main__":
    draw()
