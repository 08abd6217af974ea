"""Say which contexts fit into a Mac's memory, for each way to store keys and values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import common
from .serve import METAL_SHARE, size

if TYPE_CHECKING:
    from ..plan.machine import Machine
    from ..plan.plan import Plan, Question, Row

EXAMPLES = (
    "vllm-metal-tq plan --model llama-3.2-1b --memory 8GB --weights-bits 4 --chip M1",
    "vllm-metal-tq plan --model qwen3-8b --memory 16GB --weights-bits 4 --context 32768 --json",
    "vllm-metal-tq plan --model ./config.json --memory 24GB --engine vllm --plot plan.png",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``plan``."""
    parser.add_argument(
        "--model",
        required=True,
        help="a shipped name such as llama-3.2-1b, a folder, a config.json, or a Hugging Face id",
    )
    parser.add_argument("--memory", help="of the Mac, such as 8GB (default: of this one)")
    parser.add_argument(
        "--kv-budget",
        help="what the cache may take, such as 2GB (10^9 bytes each, as in serve; default: 80%% of "
        "what macOS recommends for a process and the weights leave)",
    )
    parser.add_argument(
        "--weights-bits",
        type=int,
        help="bits of a weight: 2, 3, 4, 5, 6, 8 or 16 (default: as published)",
    )
    parser.add_argument("--context", type=int, help="tokens of a sequence")
    parser.add_argument("--concurrency", type=int, help="sequences at a time (default: 1)")
    parser.add_argument("--chip", help="estimate decode speed on it, such as M1 or 'M4 Max'")
    parser.add_argument(
        "--engine",
        default="mlx_lm",
        help="who allocates: mlx_lm (scripts, generate, serve) or vllm (default: mlx_lm)",
    )
    parser.add_argument("--k-quant", help="add a row with keys of this width, such as q8_0")
    parser.add_argument("--v-quant", help="likewise of values")
    parser.add_argument("--plot", metavar="FILE", help="also draw the longest contexts, as .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Plan, and print what fits."""
    extra = common.scheme(args) if args.k_quant or args.v_quant else None
    from ..plan import plan

    made = plan.plan(_question(args), plan.schemes(extra))
    if args.plot:
        from ..plan import chart

        chart.draw(made, args.plot, f"{args.model}: {common.size(made.question.budget)} of cache")
    if args.json:
        common.print_json(made.fields())
    else:
        _print(made)


def _question(args: argparse.Namespace) -> Question:
    from ..plan import machine, models, plan, sources

    with common.progress_bar("config.json"):  # which may have to be fetched
        config, file_bytes = sources.find(args.model)
    return plan.Question(
        models.read(args.model, config),
        _mac(args.memory),
        cache_share=METAL_SHARE,
        kv_budget=_budget(args.kv_budget) if args.kv_budget else None,
        weights_bits=args.weights_bits,
        file_bytes=file_bytes,
        context=args.context,
        concurrency=args.concurrency,
        engine=args.engine,
        bandwidth=machine.bandwidth(args.chip) if args.chip else None,
    )


def _budget(text: str) -> int:
    try:
        return size(text)
    except ValueError:
        raise ValueError(f"--kv-budget {text!r} is no size: expected such as 2GB") from None


def _mac(memory: str | None) -> Machine:
    from ..plan import machine

    found = machine.mac(memory)
    if found is None:
        raise ValueError("--memory is needed, such as 8GB: this machine is no Mac with Metal")
    return found


def _print(plan: Plan) -> None:
    question = plan.question
    source = "says this Mac" if question.machine.measured else "estimate"
    limit = question.model.max_position
    common.print_table(
        {
            "memory": common.size(question.machine.memory_bytes),
            f"a process may use ({source})": common.size(question.machine.working_set_bytes),
            f"weights, {question.model.weights.count:,} parameters": common.size(
                question.weight_bytes
            ),
            "for the cache": common.size(question.budget),
            "context the model was made for": f"{limit:,}" if limit else "unknown",
        }
    )
    if question.budget > question.left:
        print(f"--kv-budget is more than the weights leave, {common.size(question.left)}")
    columns = _columns(plan)
    common.print_columns(
        list(columns), [[cell(row) for cell in columns.values()] for row in plan.rows]
    )
    _print_notes(plan)
    if any(_is_beyond(plan, row) for row in plan.rows):
        print("* longer than the model was made for")
    if question.bandwidth and plan.decode_context:
        print(
            "tok/s: an estimate from above, bytes of weights and cache over a bandwidth of "
            f"{question.bandwidth / 1e9:g} GB/s, at {plan.decode_context:,} tokens"
        )


def _print_notes(plan: Plan) -> None:
    """Below the table, where no column is narrowed by them, and each once."""
    noted: dict[str, list[str]] = {}
    for row in plan.rows:
        if row.note:
            noted.setdefault(row.note, []).append(row.scheme.name)
    for note, names in noted.items():
        print(f"{', '.join(names)}: {note}")


def _columns(plan: Plan) -> dict[str, Callable[[Row], str]]:
    """Header -> what a row has below it."""
    from ..plan.plan import CONTEXT

    question = plan.question
    sequences, context = question.concurrency or 1, question.context or CONTEXT
    columns: dict[str, Callable[[Row], str]] = {
        "cache": lambda row: f"[bold cyan]{row.scheme.name}[/]" if row.ours else row.scheme.name,
        "bytes a token": lambda row: _number(row.bytes_per_token),
        "longest context" + (f" of {sequences}" if sequences > 1 else ""): lambda row: (
            ("any" if row.cache and row.max_context is None else _number(row.max_context))
            + (" *" if _is_beyond(plan, row) else "")
        ),
        f"sequences of {context:,}": lambda row: _number(row.max_concurrency),
    }
    if question.bandwidth:
        columns["tok/s, estimate"] = lambda row: _number(plan.decode_rate(row), ",.1f")
    if question.context:
        columns[f"fits {sequences} x {context:,}"] = lambda row: _yes_or_no(row.fits)
    return columns


def _is_beyond(plan: Plan, row: Row) -> bool:
    limit = plan.question.model.max_position
    return bool(limit and row.max_context and row.max_context > limit)


def _number(value: float | None, style: str = ",") -> str:
    return "" if value is None else format(value, style)


def _yes_or_no(value: bool | None) -> str:
    return {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[value]
