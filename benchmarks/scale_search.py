"""What trying several steps per vector is worth, and what the steps should be multiples of.

Mean square error on N(0, 1) under the best scale of the chosen codes, relative to one step that is
right on average (the best uniform loading for keys, the RMS for values).

    python benchmarks/scale_search.py
"""

from vllm_metal_tq import openblas

openblas.preload()

import mlx.core as mx  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vllm_metal_tq import codec  # noqa: E402
from vllm_metal_tq.codebook import key_codebook, value_codebook  # noqa: E402
from vllm_metal_tq.config import WIDTHS  # noqa: E402

# Step of the best uniform quantiser of N(0, 1) (Max 1960, table II).
UNIFORM_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}


def error(y: mx.array, steps: list[mx.array], codebook) -> float:
    _, z = codec._nearest(y, steps, codebook)
    residual = mx.square(y).sum(axis=-1) - mx.square((y * z).sum(-1)) / mx.square(z).sum(-1)
    return (residual.sum() / mx.square(y).sum()).item()


def main():
    table = Table("bits", "D", "keys, 7 of RMS", "keys, 7 of largest", "values, 7 of RMS")
    for bits in WIDTHS:
        half = 2 ** (bits - 1)
        for dim in (64, 128):
            y = mx.random.normal((16384, dim), key=mx.random.key(dim))
            rms = mx.sqrt(mx.square(y).mean(axis=-1, keepdims=True))
            peak = mx.abs(y).max(axis=-1, keepdims=True)
            step = rms * UNIFORM_STEP[bits]
            keys, values = key_codebook(bits), value_codebook(bits)
            one = error(y, [step], keys), error(y, [rms], values)
            figures = (
                error(y, [step * m for m in codec.VALUE_STRETCHES], keys) / one[0],
                error(y, [peak * (clip / half) for clip in codec.KEY_CLIPS], keys) / one[0],
                error(y, [rms * m for m in codec.VALUE_STRETCHES], values) / one[1],
            )
            table.add_row(str(bits), str(dim), *(f"{figure:.3f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
