"""Measure what compression should know of a model, on a text, and keep it in a file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import CALIBRATION_TOKENS, TurboQuantConfig
from . import common

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..calibration import Calibration

PROBED_TOKENS = 385  # that widths are chosen on: every layer runs over them twice

EXAMPLES = (
    "vllm-metal-tq calibrate --model demo",
    "vllm-metal-tq calibrate --model demo --budget-bits 4.0 --output demo.safetensors",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``calibrate``."""
    common.add_model_argument(parser)
    parser.add_argument("--text", help="a text file (default: the one that is shipped)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        help="tokens of it to use at most",
    )
    parser.add_argument(
        "--output",
        help="the file to write, found by itself if it is turboquant.safetensors in the model's "
        "folder (default: one in the user's cache directory, which is found by itself as well)",
    )
    parser.add_argument(
        "--budget-bits",
        type=float,
        help="also measure how much each layer's keys and values matter, and choose widths that "
        "take so many bits an element on average, scales included; they serve where no others "
        "are named",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Calibrate, write the file, and say where it is."""
    if args.tokens < 64:
        raise ValueError(f"--tokens {args.tokens} must be at least 64")
    text = common.read_text(args.text, "calibration.txt")
    from .. import calibration

    model, tokenizer = common.load_model(args.model)
    tokens = tokenizer.encode(text)[: args.tokens]
    measured = common.calibrate(model, tokens)
    if args.budget_bits is not None:
        measured = replace(measured, config=_widths(model, tokens, measured, args.budget_bits))
    file = Path(args.output) if args.output else calibration.place(model)
    measured.save(file)
    layers = sum(centre is not None for centre in measured.centres)
    if args.json:
        common.print_json(
            {
                "model": args.model,
                "file": str(file),
                "bytes": file.stat().st_size,
                "tokens": len(tokens),
                "layers_calibrated": layers,
                "layers": len(measured.centres),
                "widths": measured.config and measured.config.layers,
            }
        )
        return
    common.print_table(
        {
            "layers calibrated": f"{layers} of {len(measured.centres)}",
            "tokens": str(len(tokens)),
            "size": common.size(file.stat().st_size),
        }
    )
    if measured.config:
        print(measured.config.layers)
    print(file)  # alone on its line, so that it can be copied


def _widths(
    model: nn.Module, tokens: list[int], calibration: Calibration, budget: float
) -> TurboQuantConfig:
    """Widths for each layer within a budget of bits."""
    from .. import budget as budgets
    from ..integrations.mlx_lm import make_prompt_cache
    from ..integrations.mlx_lm.parts import compressed

    caches = make_prompt_cache(model, calibration=calibration)
    head_dims = [c.layout.head_dim if c else None for c in map(compressed, caches)]
    budgets.check(budget, head_dims)
    with common.progress_bar("measure") as advance:
        some = tokens[:PROBED_TOKENS]
        found = budgets.sensitivities(model, some, calibration, advance)
    return budgets.assign(found, budget, head_dims)
