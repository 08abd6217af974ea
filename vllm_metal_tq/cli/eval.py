"""Measure what compression changes: perplexity and KL divergence, retrieval, word problems."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TurboQuantConfig
from . import common

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..types import MakeCaches

# Options of one mode alone, and their defaults.
_OPTIONS: dict[str, dict[str, int | None]] = {
    "needle": {"depths": 10},
    "gsm8k": {"questions": 20, "shots": 5, "max_tokens": 256},
    "sweep": {"schemes": None},
}

EXAMPLES = (
    "vllm-metal-tq eval --model demo --preset tq4",
    "vllm-metal-tq eval --model demo --needle --window 1024 --depths 5",
    "vllm-metal-tq eval --model demo --gsm8k problems.jsonl --questions 10",
    "vllm-metal-tq eval --model demo --sweep --schemes tq4,tq3,q8_0/q3_0 --out results",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``eval``."""
    common.add_model_argument(parser)
    common.add_scheme_arguments(parser)
    common.add_layers_argument(parser)
    common.add_calibration_arguments(parser)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--needle", action="store_true", help="find a fact hidden in the text at several depths"
    )
    modes.add_argument(
        "--gsm8k", metavar="FILE", help="solve problems of a JSON Lines file (question, answer)"
    )
    modes.add_argument(
        "--sweep", action="store_true", help="measure every preset and what lies between them"
    )
    parser.add_argument("--text", help="a text file (default: a chapter of Alice in Wonderland)")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="positions to score, where the text has them"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=1024,
        help="tokens of a window, whose second half is scored; of a prompt with --needle",
    )
    parser.add_argument("--depths", type=int, help="--needle: how many depths (default: 10)")
    parser.add_argument("--questions", type=int, help="--gsm8k: how many to ask (default: 20)")
    parser.add_argument("--shots", type=int, help="--gsm8k: examples before each (default: 5)")
    parser.add_argument(
        "--max-tokens", type=int, help="--gsm8k: tokens of an answer at most (default: 256)"
    )
    parser.add_argument(
        "--schemes", help="--sweep: what to measure instead, such as tq4,tq3,q8_0/q4_0"
    )
    parser.add_argument(
        "--no-tail",
        action="store_true",
        help="measure as if no recent tokens were kept as they came, a token's own aside",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write the results there as JSON and Markdown, with --sweep a plot (PNG) too",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Evaluate and print the figures."""
    mode = next((name for name in _OPTIONS if getattr(args, name)), "perplexity")
    _take_defaults(args, mode)
    {"needle": _needle, "gsm8k": _gsm8k, "sweep": _sweep, "perplexity": _perplexity}[mode](args)


def _take_defaults(args: argparse.Namespace, mode: str) -> None:
    for owner, options in _OPTIONS.items():
        for name, default in options.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif owner != mode:
                raise ValueError(f"--{name.replace('_', '-')} can be given with --{owner} only")


def _perplexity(args: argparse.Namespace) -> None:
    common.scheme(args)  # a bad name is an error before anything is loaded
    text = common.read_text(args.text, "alice.txt")
    from ..evaluate import evaluate

    model, tokenizer = common.load_model(args.model)
    calibration = common.calibration_for(args, model, tokenizer)
    config = common.scheme(args, calibration)
    with common.progress_bar("eval") as advance:
        quality = evaluate(
            model,
            tokenizer.encode(text),
            config,
            window=args.window,
            tokens=args.tokens,
            calibration=calibration,
            tail=not args.no_tail,
            progress=advance,
        )
    rows = {
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
    figures = asdict(quality) | {"dppl_percent": quality.dppl_percent}
    if not _wrote(args, "eval", figures | common.scheme_fields(config), _two_columns(rows)):
        common.print_table(rows)


def _needle(args: argparse.Namespace) -> None:
    common.scheme(args)
    text = common.read_text(args.text, "alice.txt")
    from .. import needle

    model, tokenizer = common.load_model(args.model)
    config, caches = _caches(args, model, tokenizer)
    with common.progress_bar("needle") as advance:
        trials = needle.retrieve(
            model,
            tokenizer,
            tokenizer.encode(text),
            caches,
            context=args.window,
            depths=args.depths,
            progress=advance,
        )
    found, found_reference = (
        sum(getattr(trial, name) for trial in trials) for name in ("found", "found_reference")
    )
    fields = {
        "context": args.window,
        "found": found,
        "found_reference": found_reference,
        "trials": [
            asdict(trial) | {"found": trial.found, "found_reference": trial.found_reference}
            for trial in trials
        ],
    }
    fields |= common.scheme_fields(config)
    if not _wrote(args, "needle", fields, needle.markdown(trials)):
        rows = [
            [f"{100 * t.depth:.0f} %", t.number, t.answer.strip(), t.answer_reference.strip()]
            for t in trials
        ]
        rows.append(["found", "", *(f"{n} of {len(trials)}" for n in (found, found_reference))])
        common.print_columns(["depth", "number", config.label, "uncompressed"], rows)


def _gsm8k(args: argparse.Namespace) -> None:
    common.scheme(args)
    from .. import gsm8k

    problems = gsm8k.load(args.gsm8k)
    model, tokenizer = common.load_model(args.model)
    config, caches = _caches(args, model, tokenizer)
    with common.progress_bar("gsm8k") as advance:
        answers = gsm8k.solve(
            model,
            tokenizer,
            problems,
            caches,
            questions=args.questions,
            shots=args.shots,
            max_tokens=args.max_tokens,
            progress=advance,
        )
    summary = gsm8k.summary(answers)
    count = len(answers)
    rows = {
        "scheme": config.label,
        "questions": str(count),
        "right": f"{100 * summary['accuracy']:.1f} %",
        "uncompressed": f"{100 * summary['accuracy_reference']:.1f} %",
        "same number": f"{100 * summary['same_number']:.1f} %",
        "same text": f"{100 * summary['same_text']:.1f} %",
    }
    fields = {"questions": count, "shots": args.shots} | summary | common.scheme_fields(config)
    if not _wrote(args, "gsm8k", fields, _two_columns(rows)):
        common.print_table(rows)


def _sweep(args: argparse.Namespace) -> None:
    if args.preset or args.k_quant or args.v_quant or args.layers:
        raise ValueError("--sweep measures many schemes: choose them with --schemes")
    text = common.read_text(args.text, "alice.txt")
    from .. import sweep
    from ..evaluate import compressed

    configs = _schemes(args.schemes) or [TurboQuantConfig(*pair) for pair in sweep.PAIRS]
    if args.out and (missing := sweep.why_not_draw()):
        raise ValueError(f"--sweep --out: {missing}")
    model, tokenizer = common.load_model(args.model)
    calibration = common.calibration_for(args, model, tokenizer)
    methods = [
        compressed(model, config, args.window, calibration=calibration, tail=not args.no_tail)
        for config in configs
    ]
    with common.progress_bar("sweep") as advance:
        points = sweep.measure(
            model,
            tokenizer.encode(text),
            methods,
            window=args.window,
            tokens=args.tokens,
            progress=advance,
        )
    best = sweep.frontier(points)
    fields = {
        "window": args.window,
        "points": [point.fields() | {"frontier": point in best} for point in points],
    }
    wrote = _wrote(args, "sweep", fields, sweep.markdown(points))
    if args.out:
        title = f"{args.model}, windows of {args.window} tokens"
        sweep.draw(points, str(args.out / "sweep.png"), title)
    if not wrote:
        header = ["scheme", "bits", "KL mean", "KL p99", "perplexity", "top-1", "frontier"]
        common.print_columns(header, sweep.rows(points))


def _schemes(names: str | None) -> list[TurboQuantConfig]:
    """The configs that ``--schemes`` names: presets, or key and value widths with a slash."""
    found = []
    for name in (names or "").split(",") if names else ():
        k_quant, slash, v_quant = name.strip().partition("/")
        if slash:
            found.append(TurboQuantConfig.from_names(None, k_quant, v_quant))
        else:
            found.append(TurboQuantConfig.from_names(k_quant))
    return found


def _caches(
    args: argparse.Namespace, model: nn.Module, tokenizer: TokenizerWrapper
) -> tuple[TurboQuantConfig, MakeCaches]:
    """The config, and what makes caches with it under the conditions of decoding."""
    from ..evaluate import compressed

    calibration = common.calibration_for(args, model, tokenizer)
    config, tail = common.scheme(args, calibration), not args.no_tail
    method = compressed(model, config, args.window, calibration=calibration, tail=tail)
    return config, method.caches


def _two_columns(rows: dict[str, str]) -> str:
    """Names and figures as a Markdown table."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {figure} |" for name, figure in rows.items())]
    return "\n".join(lines) + "\n"


def _wrote(args: argparse.Namespace, name: str, fields: dict[str, Any], markdown: str) -> bool:
    """Write what ``--out`` asks for; print JSON if ``--json`` does, and return whether it did."""
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(fields, indent=1) + "\n"
        (args.out / f"{name}.json").write_text(text, encoding="utf-8")
        (args.out / f"{name}.md").write_text(markdown, encoding="utf-8")
    if args.json:
        common.print_json(fields)
    return bool(args.json)
