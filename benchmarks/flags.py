"""Which tokens have their means subtracted, and what choosing them otherwise would give.

python benchmarks/flags.py [--text FILE] [--tokens 512] [--bits 4]

Mean square errors of the demo model's keys (smoothed) and values, over their energy, mean of all
layers: with flags set by length as the codec does, by the codes' true errors, always and never.
"""

import argparse

from vllm_metal_tq import openblas

openblas.preload()

from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx_lm.models.cache as host  # noqa: E402
import numpy as np  # noqa: E402
import shipped  # noqa: E402

from vllm_metal_tq import codec, demo_model  # noqa: E402
from vllm_metal_tq.codebook import key_codebook, value_codebook  # noqa: E402
from vllm_metal_tq.config import SCALAR_WIDTHS  # noqa: E402
from vllm_metal_tq.rotation import rotate  # noqa: E402


def energy(x):
    return np.array(mx.square(x).sum(axis=-1))


def error(x, encode, codebook):
    """Square error of each vector."""
    y = rotate(x)
    codes, scale = encode(y, codebook.bits)
    return energy(y - codebook.levels(codes) * scale[..., None].astype(mx.float32))


def choices(x, mean, encode, codebook):
    """Errors by length, by true error, always, never; the share of flags; how many differ."""
    less, whole = error(x - mean, encode, codebook), error(x, encode, codebook)
    by_length = energy(x - mean) < energy(x)
    kinds = (np.where(by_length, less, whole), np.minimum(less, whole), less, whole)
    figures = [kind.mean() / energy(x).mean() for kind in kinds]
    return [*figures, by_length.mean(), (by_length != (less < whole)).mean()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bits", type=int, choices=SCALAR_WIDTHS, default=4)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8") if args.text else shipped.text("alice.txt")
    model, tokenizer = demo_model.load()
    calibration = shipped.calibration(model, tokenizer)
    ids = tokenizer.encode(text)[: args.tokens]
    caches = host.make_prompt_cache(model)
    mx.eval(model(mx.array([ids]), cache=caches))
    rows = {"keys": [], "values": []}
    for centre, cache in zip(calibration.centres, caches, strict=True):
        keys, values = (x[0, :, : len(ids)] for x in (cache.keys, cache.values))
        t, means = centre.smoothing[:, None], centre.at(mx.arange(len(ids)))
        codebooks = key_codebook(args.bits), value_codebook(args.bits)
        rows["keys"].append(choices(keys * t, means * t, codec.encode_keys, codebooks[0]))
        mean = centre.value_mean[:, None]
        rows["values"].append(choices(values, mean, codec.encode_values, codebooks[1]))
    print("| | by length | by error | always | never | flagged | chosen otherwise by error |")
    print("|---|---|---|---|---|---|---|")
    for name, figures in rows.items():
        *errors, flagged, differ = np.mean(figures, axis=0)
        cells = [*(f"{e:.6f}" for e in errors), f"{100 * flagged:.1f} %", f"{100 * differ:.1f} %"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
