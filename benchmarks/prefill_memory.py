"""Peak memory of a long prompt, compressed and not, each in a process of its own.

    python benchmarks/prefill_memory.py [--lengths 1024 2048 4096 8192] [--plot FILE]

The model is the demo model, its prompt real text over and over; what weights take is left out. The
goal: with compression no more than the compressed cache, 1.2 times one layer's keys and values as
the model makes them (float32), and what the uncompressed run needs besides its own cache.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

LENGTHS = (1024, 2048, 4096, 8192)
DENSE, OURS = "uncompressed", "tq4"
STEP = 512  # tokens of a chunk of the prompt
SPARE = 1.2  # of one layer's keys and values
MIB = 2**20


def measure(kind: str, length: int) -> dict[str, int]:
    """Bytes of the peak above the weights, of the cache, and of one layer's keys and values."""
    from vllm_metal_tq import openblas

    openblas.preload()
    import mlx.core as mx
    import shipped
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache as make_dense_cache

    from vllm_metal_tq import TurboQuantConfig, demo_model, make_prompt_cache
    from vllm_metal_tq.integrations.mlx_lm import report

    model, tokenizer = demo_model.load()
    ids = tokenizer.encode(shipped.text("alice.txt"))
    ids = (ids * (length // len(ids) + 1))[:length]
    caches = make_dense_cache(model)
    if kind == OURS:
        calibration = shipped.calibration(model, tokenizer)
        caches = make_prompt_cache(model, TurboQuantConfig.from_names(kind), None, calibration)
    mx.eval(model.parameters())
    mx.clear_cache()
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    steps = generate_step(mx.array(ids), model, prompt_cache=caches, prefill_step_size=STEP)
    next(steps)
    steps.close()
    args = model.args
    head_dim = args.hidden_size // args.num_attention_heads
    return {
        "peak": mx.get_peak_memory() - weights,
        "cache": report(caches).kv_bytes,
        "layer": 2 * length * args.num_key_value_heads * head_dim * mx.float32.size,
    }


def in_a_process(kind: str, length: int) -> dict[str, int]:
    """``measure`` where nothing ran before."""
    command = [sys.executable, __file__, "--measure", kind, str(length)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def allowed(ours: dict[str, int], dense: dict[str, int]) -> float:
    """The goal for ``ours``."""
    return ours["cache"] + SPARE * ours["layer"] + dense["peak"] - dense["cache"]


def plot(found: dict[str, dict[int, dict[str, int]]], file: Path) -> None:
    """Peaks over lengths, and the caches in them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, (kind, by_length) in enumerate(found.items()):
        lengths = list(by_length)
        for part, style in (("peak", "o-"), ("cache", "s:")):
            sizes = [by_length[n][part] / MIB for n in lengths]
            axes.plot(lengths, sizes, style, color=f"C{number}", label=f"{kind}, {part}")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("MiB above the weights")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, length = args.measure
        print(json.dumps(measure(kind, int(length))))
        return
    found = {kind: {n: in_a_process(kind, n) for n in args.lengths} for kind in (DENSE, OURS)}
    names = "dense cache", "dense peak", "tq4 cache", "tq4 peak", "goal"
    table = Table("tokens", *names, title="MiB")
    for length in args.lengths:
        dense, ours = (found[kind][length] for kind in (DENSE, OURS))
        sizes = dense["cache"], dense["peak"], ours["cache"], ours["peak"], allowed(ours, dense)
        table.add_row(str(length), *(f"{size / MIB:.1f}" for size in sizes))
    Console().print(table)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
