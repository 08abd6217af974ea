"""Say which contexts fit into a Mac's memory, for each way to store keys and values."""

from __future__ import annotations

import argparse

from . import common
from .serve import METAL_SHARE, size


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
        help="what the cache may take, such as 2GB (default: as in serve, 80%% of what macOS "
        "recommends for a process and the weights leave)",
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
        _print(made, args.chip)


def _question(args: argparse.Namespace):
    from ..plan import machine, models, plan, sources

    bandwidth = args.chip and machine.bandwidth(args.chip)
    mac = _mac(args.memory)
    config, file_bytes = sources.find(args.model)
    return plan.Question(
        models.read(args.model, config),
        mac,
        cache_share=METAL_SHARE,
        kv_budget=args.kv_budget and _budget(args.kv_budget),
        weights_bits=args.weights_bits,
        file_bytes=file_bytes,
        context=args.context,
        concurrency=args.concurrency,
        engine=args.engine,
        bandwidth=bandwidth,
    )


def _budget(text: str) -> int:
    try:
        return size(text)
    except ValueError:
        raise ValueError(f"--kv-budget {text!r} is no size: expected such as 2GB") from None


def _mac(memory: str | None):
    """The Mac that was asked for; where it is the one that runs this, it says what it allows."""
    from ..plan import machine

    here = machine.this_mac()
    if memory is None:
        if here is None:
            raise ValueError("--memory is needed, such as 8GB: this machine is no Mac with Metal")
        return here
    wanted = machine.memory_size(memory)
    return here if here and here.memory_bytes == wanted else machine.estimated(wanted)


def _print(plan, chip: str | None) -> None:
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
    rate = chip and plan.decode_context
    header = _header(plan, rate)
    rows = [_cells(plan, row, rate) for row in plan.rows]
    noted = any(row.note for row in plan.rows)
    common.print_columns(header + ["note"] * noted, [row[: len(header) + noted] for row in rows])
    if limit and any(row.max_context and row.max_context > limit for row in plan.rows):
        print("* longer than the model was made for")
    if rate:
        print(
            f"tok/s on {chip}: an estimate from above, bytes of weights and cache over its "
            f"bandwidth ({question.bandwidth / 1e9:g} GB/s), at {rate:,} tokens"
        )


def _header(plan, rate) -> list[str]:
    from ..plan.plan import CONTEXT

    question = plan.question
    count, context = question.concurrency or 1, question.context or CONTEXT
    header = ["cache", "bytes a token", "longest context" + (f" of {count}" * (count > 1))]
    header.append(f"sequences of {context:,}")
    header += ["tok/s, estimate"] if rate else []
    return [*header, f"fits {count} x {context:,}"] if question.context else header


def _cells(plan, row, rate) -> list[str]:
    """The cells of a row, its note last."""
    name = f"[bold cyan]{row.scheme.name}[/]" if row.scheme.config else row.scheme.name
    note = f"[dim]{row.note}[/]"
    if row.cache is None:
        return [name, *[""] * (len(_header(plan, rate)) - 1), note]
    longest, limit = row.max_context, plan.question.model.max_position
    beyond = " *" if limit and longest and longest > limit else ""
    cells = [name, f"{row.cache.token_bytes:,}"]
    cells += ["any" if longest is None else f"{longest:,}{beyond}", f"{row.max_concurrency:,}"]
    cells += [f"{plan.decode_rate(row):,.1f}"] if rate else []
    if row.fits is not None:
        cells.append("[green]yes[/]" if row.fits else "[red]no[/]")
    return [*cells, note]
