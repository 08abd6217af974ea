"""Measure perplexity, KL divergence and top-1 agreement against the uncompressed cache."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``eval``."""
    common.add_model_argument(parser)
    common.add_scheme_arguments(parser)
    common.add_calibration_arguments(parser)
    parser.add_argument("--text", help="a text file (default: a chapter of Alice in Wonderland)")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="positions to score, where the text has them"
    )
    parser.add_argument(
        "--window", type=int, default=1024, help="tokens of a window; its second half is scored"
    )
    parser.add_argument(
        "--no-tail",
        action="store_true",
        help="measure as if no recent tokens were kept as they came, a token's own aside",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Evaluate and print the figures."""
    config = common.scheme(args)
    text = common.read_text(args.text, "alice.txt")
    from ..evaluate import TAIL, evaluate

    model, tokenizer = common.load_model(args.model)
    calibration = common.calibration_for(args, model, tokenizer)
    with common.progress_bar("eval") as advance:
        quality = evaluate(
            model,
            tokenizer.encode(text),
            config,
            window=args.window,
            tokens=args.tokens,
            calibration=calibration,
            raw_window=1 if args.no_tail else TAIL,
            progress=advance,
        )
    if args.json:
        fields = asdict(quality) | {"dppl_percent": quality.dppl_percent}
        common.print_json(fields | common.scheme_fields(config))
        return
    common.print_table(
        {
            "scheme": config.label,
            "bits/element": f"{quality.bits_per_element:.2f}",
            "perplexity": f"{quality.ppl:.3f}",
            "uncompressed": f"{quality.ppl_reference:.3f}",
            "change": f"{quality.dppl_percent:+.2f} %",
            "KL mean": f"{quality.kl_mean:.4f}",
            "KL p99": f"{quality.kl_p99:.4f}",
            "top-1": f"{100 * quality.top1:.1f} %",
            "tokens": str(quality.tokens),
        }
    )
