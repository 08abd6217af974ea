"""The tables of docs/quality.md: every preset, and what each part of the method is worth.

    python benchmarks/quality.py [--text FILE] [--window 1024] [--tokens 1024]

measures the presets; with --parts what each part of the method is worth; with --calibrate-on
FILE ... how much it matters which text calibration saw, the scored text itself among them.
"""

import argparse
from dataclasses import replace

from vllm_metal_tq import openblas

openblas.preload()

from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
import shipped  # noqa: E402

from vllm_metal_tq import TurboQuantConfig, demo_model, sweep  # noqa: E402
from vllm_metal_tq.calibration import Calibration  # noqa: E402
from vllm_metal_tq.config import CALIBRATION_TOKENS, PRESETS  # noqa: E402
from vllm_metal_tq.evaluate import Method, compressed  # noqa: E402
from vllm_metal_tq.integrations.mlx_lm import calibrate  # noqa: E402

PARTS = ("tq4", "tq3", "tq2")  # the presets whose parts are measured


def without(calibration: Calibration, *parts: str) -> Calibration:
    """``calibration`` with means set to 0 and smoothing to 1."""

    def neutral(centre):
        if centre is None:
            return None
        changes = {
            part: (mx.ones_like if part == "smoothing" else mx.zeros_like)(getattr(centre, part))
            for part in parts
        }
        return replace(centre, **changes)

    return replace(calibration, centres=tuple(map(neutral, calibration.centres)))


Kind = tuple[Calibration | None, bool, str]  # calibration, whether with the tail, a name


def default_kinds(calibration: Calibration) -> list[Kind]:
    return [(calibration, True, "default"), (calibration, False, "without tail")]


def part_kinds(calibration: Calibration) -> list[Kind]:
    """One part after the other."""
    return [
        (None, False, "codes alone"),
        (without(calibration, "smoothing", "value_mean"), False, "+ centred keys"),
        (without(calibration, "value_mean"), False, "+ smoothing"),
        (calibration, False, "+ value mean"),
        (calibration, True, "+ tail"),
    ]


def text_kinds(calibration: Calibration, others: dict[str, Calibration]) -> list[Kind]:
    """Calibrations of several texts."""
    found = {"no text": None, "the shipped text": calibration} | others
    return [(one, True, f"calibrated on {name}") for name, one in found.items()]


def method(model, window: int, preset: str, kind: Kind) -> Method:
    calibration, tail, name = kind
    config = TurboQuantConfig.from_names(preset)
    made = compressed(model, config, window, calibration=calibration, tail=tail)
    return replace(made, name=f"{preset}, {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--parts", action="store_true", help="what each part is worth")
    parser.add_argument("--calibrate-on", type=Path, nargs="*", help="other texts")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8") if args.text else shipped.text("alice.txt")
    model, tokenizer = demo_model.load()

    def calibrated(text: str) -> Calibration:
        return calibrate(model, tokenizer.encode(text)[:CALIBRATION_TOKENS])

    calibration = shipped.calibration(model, tokenizer)
    presets, kinds = PARTS, part_kinds(calibration)
    if args.calibrate_on is not None:
        texts = {file.name: file.read_text(encoding="utf-8") for file in args.calibrate_on}
        texts["the scored text"] = text
        others = {name: calibrated(other) for name, other in texts.items()}
        kinds = text_kinds(calibration, others)
    elif not args.parts:
        presets, kinds = tuple(PRESETS), default_kinds(calibration)
    points = sweep.measure(
        model,
        tokenizer.encode(text),
        [method(model, args.window, preset, kind) for preset in presets for kind in kinds],
        window=args.window,
        tokens=args.tokens,
    )
    print("| cache | bits | perplexity | change | KL mean | KL p99 | top-1 |")
    print("|---|---|---|---|---|---|---|")
    for point in points:
        q = point.quality
        print(
            f"| {point.name} | {q.bits_per_element:.2f} | {q.ppl:.2f} | {q.dppl_percent:+.2f} % "
            f"| {q.kl_mean:.5f} | {q.kl_p99:.4f} | {100 * q.top1:.1f} % |"
        )
    print(f"\n{q.tokens} positions; perplexity with the uncompressed cache: {q.ppl_reference:.2f}")


if __name__ == "__main__":
    main()
