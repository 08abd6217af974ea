"""Grow a context until memory or the model ends it, with mlx_lm's caches and with ours."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import DEFAULT_PRESET, TurboQuantConfig
from . import bench_model, common

if TYPE_CHECKING:
    from ..bench.context import Step
    from ..bench.context_report import Run

STEP = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``bench context``."""
    common.add_model_argument(parser)
    parser.add_argument("--memory", help="of the Mac, such as 8GB (default: of this one, if any)")
    parser.add_argument(
        "--presets", default=DEFAULT_PRESET, help=f"such as tq4,tq8 (default: {DEFAULT_PRESET})"
    )
    parser.add_argument("--max-context", type=int, help="tokens to end at (default: the model's)")
    parser.add_argument(
        "--step", type=int, default=STEP, help=f"tokens between measurements (default: {STEP})"
    )
    common.add_calibration_arguments(parser)
    parser.add_argument("--csv", metavar="FILE", help="also write every step there")
    parser.add_argument("--plot", metavar="FILE", help="also draw the steps, as .png")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of Markdown"
    )


def run(args: argparse.Namespace) -> None:
    """Measure each cache in a process of its own, and print a report."""
    configs = _check(args)
    limit_bytes = _limit_bytes(args.memory)
    from ..bench import context, context_report
    from ..bench.caches import BASELINES

    facts = bench_model.facts(args)
    lengths = context.contexts(args.step, _longest(args, facts, limit_bytes))
    caches = [*BASELINES, *configs]
    runs = []
    with common.progress_bar("bench context") as advance:
        for number, cache in enumerate(caches):
            done = context_report.Run(facts.label(cache))
            runs.append(done)
            for step in _steps(done, args, cache, lengths, limit_bytes):
                done.steps.append(step)
                advance(number * len(lengths) + len(done.steps), len(caches) * len(lengths))
            done.stopped = done.stopped or _end(args, lengths[-1])
    _write(args, facts, runs, limit_bytes)


def _check(args: argparse.Namespace) -> dict[str, TurboQuantConfig]:
    """Our caches by name; bad arguments are errors before a model is loaded."""
    from ..bench.context import LEAST_STEP
    from ..sweep import why_not_draw

    presets = [name.strip() for name in args.presets.split(",")]
    configs = {name: TurboQuantConfig.from_names(name) for name in presets}
    for flag, number in (("--step", args.step), ("--max-context", args.max_context)):
        if number is not None and number < LEAST_STEP:
            raise ValueError(f"{flag} {number} is too small: at least {LEAST_STEP} tokens")
    for flag, file in (("--csv", args.csv), ("--plot", args.plot)):
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"{flag} {file!r}: there is no folder {str(Path(file).parent)!r}")
    if args.plot and Path(args.plot).suffix != ".png":
        raise ValueError(f"--plot {args.plot!r} must end in .png")
    if args.plot and (missing := why_not_draw()):
        raise ValueError(f"--plot: {missing}")
    return configs


def _limit_bytes(memory: str | None) -> int | None:
    """What MLX may hold: of a Mac with so much memory, or of this one; None: there is no limit."""
    from ..plan import machine

    mac = machine.mac(memory)
    return mac.working_set_bytes if mac else None


def _longest(args: argparse.Namespace, facts: bench_model.Facts, limit_bytes: int | None) -> int:
    if limit_bytes is not None and facts.weight_bytes >= limit_bytes:
        raise ValueError(
            f"the weights take {common.size(facts.weight_bytes)}, and a process may use "
            f"{common.size(limit_bytes)}: no memory is left for a context"
        )
    limits = [limit for limit in (args.max_context, facts.limit) if limit is not None]
    if not limits:
        raise ValueError("the model does not say how long a context may be: give --max-context")
    return min(limits)


def _end(args: argparse.Namespace, longest: int) -> str:
    given = args.max_context == longest
    return f"--max-context {longest}" if given else f"the model's longest context, {longest:,}"


def _steps(
    done: Run, args: argparse.Namespace, cache: str, lengths: list[int], limit_bytes: int | None
) -> Iterator[Step]:
    """The steps of one cache; ``done`` hears why they end before the last length."""
    from ..bench.process import ProcessError, apart

    try:
        done.stopped = (yield from apart(_grow, args, cache, lengths, limit_bytes)) or ""
    except (ValueError, ProcessError) as error:
        done.stopped = f"failed: {error}"


def _grow(
    args: argparse.Namespace, cache: str, lengths: list[int], limit_bytes: int | None
) -> Generator[Step, None, str | None]:
    """Measure one cache, in a process that does nothing else."""
    from ..bench import caches, context

    with contextlib.redirect_stderr(io.StringIO()):  # the progress shown is the parent's
        model, tokenizer = common.load_model(args.model)
        calibration = common.calibration_for(args, model, tokenizer)
    ids = tokenizer.encode(common.read_text(None, "alice.txt"))
    text = (ids * (lengths[-1] // len(ids) + 1))[: lengths[-1]]
    config = None if cache in caches.BASELINES else TurboQuantConfig.from_names(cache)
    make = caches.maker(cache, config, calibration)
    return (yield from context.grow(model, make, text, lengths, limit_bytes))


def _write(
    args: argparse.Namespace, facts: bench_model.Facts, runs: list[Run], limit_bytes: int | None
) -> None:
    from ..bench import context_report

    if args.csv:
        context_report.write_csv(runs, args.csv)
    if args.plot:
        title = f"{args.model} on {facts.machine['device']}"
        context_report.draw(runs, args.plot, title)
    if not args.json:
        print(context_report.markdown(_lines(args, facts, limit_bytes), runs))
        return
    common.print_json(
        facts.machine
        | {name: value for name, value in asdict(facts).items() if name != "machine"}
        | {"model": args.model, "limit_bytes": limit_bytes}
        | {"rows": [row for run in runs for row in run.fields()]}
        | {"stopped": {run.cache: run.stopped for run in runs}}
    )


def _lines(
    args: argparse.Namespace, facts: bench_model.Facts, limit_bytes: int | None
) -> dict[str, str]:
    """What heads the report."""
    machine = facts.machine
    allowed = "any" if limit_bytes is None else common.size(limit_bytes)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("vllm_metal_tq", "mlx", "mlx_lm"))
    return {
        "machine": f"{machine['device']}, {machine['system']}",
        "versions": versions,
        "runs": machine["runs"],
        "model": f"{args.model}, weights {common.size(facts.weight_bytes)}",
        "memory that MLX may hold": allowed + (f" (--memory {args.memory})" * bool(args.memory)),
    }
