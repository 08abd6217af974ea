"""What trying a few steps per vector is worth, and what trying many would give.

Mean square error on N(0, 1), relative to a single step that is right on average (the best uniform
loading for keys, the RMS for values). "few" are the codec's own steps; "many" are 25 fractions of
the largest element.

    python benchmarks/scale_search.py
"""

from vllm_metal_tq import openblas

openblas.preload()

from collections.abc import Sequence  # noqa: E402

import mlx.core as mx  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vllm_metal_tq import codec  # noqa: E402
from vllm_metal_tq.codebook import Gaussian, Uniform, key_codebook, value_codebook  # noqa: E402
from vllm_metal_tq.config import SCALAR_WIDTHS  # noqa: E402

# Step of the best uniform quantiser of N(0, 1) (Max 1960, table II).
UNIFORM_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
MANY = [0.5 * 1.04**i for i in range(25)]


def error(y: mx.array, codes: mx.array, scale: mx.array, codebook: Uniform | Gaussian) -> float:
    restored = codebook.levels(codes) * scale[..., None].astype(mx.float32)
    return (mx.square(y - restored).sum() / mx.square(y).sum()).item()


def single(y: mx.array, step: float, codebook: Uniform | Gaussian) -> float:
    """One step for all vectors, in units of the RMS."""
    scale = mx.sqrt(mx.square(y).mean(axis=-1)) * step
    return error(y, codebook.codes(y / scale[..., None]), scale, codebook)


def best(y: mx.array, steps: Sequence[float], codebook: Uniform | Gaussian, gain: float) -> float:
    """The best of some steps, in units of the largest element."""
    return error(y, *codec.nearest(y, steps, codebook, gain), codebook)


def main():
    names = (f"{kind}, {tried}" for kind in ("keys", "values") for tried in ("few", "many"))
    table = Table("bits", "D", *names)
    for bits in SCALAR_WIDTHS:
        keys, values, gain = key_codebook(bits), value_codebook(bits), codec.VALUE_GAINS[bits]
        for dim in (64, 128, 256):
            y = mx.random.normal((4096, dim), key=mx.random.key(dim))
            one = single(y, UNIFORM_STEP[bits], keys), single(y, 1.0, values)
            figures = (
                error(y, *codec.encode_keys(y, bits), keys) / one[0],
                best(y, [clip / 2 ** (bits - 1) for clip in MANY], keys, 1.0) / one[0],
                error(y, *codec.encode_values(y, bits), values) / one[1],
                best(y, [clip / values.largest for clip in MANY], values, gain) / one[1],
            )
            table.add_row(str(bits), str(dim), *(f"{figure:.3f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
