"""Measure what compression should know of a model, on a text, and keep it in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``calibrate``."""
    common.add_model_argument(parser)
    parser.add_argument("--text", help="a text file (default: the one that is shipped)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=common.CALIBRATION_TOKENS,
        help="tokens of it to use at most",
    )
    parser.add_argument(
        "--output",
        help="the file to write, found by itself if it is turboquant.safetensors in the model's "
        "folder (default: one in the user's cache directory, which is found by itself as well)",
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
    print(file)  # alone on its line, so that it can be copied
