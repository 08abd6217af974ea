"""Check every kernel against plain MLX operations on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import common

if TYPE_CHECKING:
    from ..kernels.selfcheck import Check
    from ..layout import PageLayout

EXECUTORS = {
    "metal": "Metal GPU",
    "cuda": "CUDA GPU",
    "simulator": "simulator",
    "reference": "reference",
}
"""What runs the kernels, best first; ``reference`` is plain MLX operations and no kernel."""
TEXT_CHECK = {"text": "Metal text, checked by clang"}

EXAMPLES = (
    "vllm-metal-tq doctor",
    "vllm-metal-tq doctor --preset tq3 --head-dim 64 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``doctor``."""
    common.add_scheme_arguments(parser)
    common.add_head_dim_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check and print; returns the exit status: 1 where a kernel is wrong."""
    layout = common.page_layout(args)
    there = _availability()
    executor = next(name for name in EXECUTORS if there[name] is None)
    checks = _checks(executor, layout)
    (_print_json if args.json else _print_tables)(there, executor, checks, layout)
    return int(not all(check.ok for check in checks))


def _print_json(
    there: dict[str, str | None], executor: str, checks: list[Check], layout: PageLayout
) -> None:
    from ..bench import clock

    for check in checks:
        if check.message:
            print(_complaint(check), file=sys.stderr)
    names = ("name", "variant", "ok", "max_rel_error")
    kernels = [{name: getattr(check, name) for name in names} for check in checks]
    ok = all(check.ok for check in checks)
    common.print_json(clock.machine() | {"executor": executor, "kernels": kernels, "ok": ok})


def _print_tables(
    there: dict[str, str | None], executor: str, checks: list[Check], layout: PageLayout
) -> None:
    from ..bench import clock

    machine = clock.machine()
    common.print_table(
        {"device": machine["device"], "MLX": machine["mlx"]}
        | {label: there[name] or "available" for name, label in (TEXT_CHECK | EXECUTORS).items()}
    )
    if checks:
        common.print_columns(["kernel", "variant", "result", "error"], map(_row, checks))
    for check in checks:
        if check.message:
            print(_complaint(check))
    print(_verdict(executor, checks, layout))


def _complaint(check: Check) -> str:
    return f"{check.name} {check.variant or ''}".strip() + f": {check.message}"


def _availability() -> dict[str, str | None]:
    """Name -> None where this machine has it, else the reason why not."""
    from .. import msl
    from ..bench import clock
    from ..msl import compiler

    gpu = clock.gpu_backend()
    return {
        "text": None if msl.find_clang() else compiler.INSTALL_HINT,
        "metal": None if gpu == "metal" else "no",
        "cuda": None if gpu == "cuda" else "no",
        "simulator": compiler.why_not_simulate(),
        "reference": None,
    }


def _checks(executor: str, layout: PageLayout) -> list[Check]:
    """Every kernel's check, by the executor."""
    from ..kernels import launch, selfcheck

    if executor == "reference":
        return []
    execute = launch.on_gpu
    if executor == "simulator":
        from ..msl import simulate

        execute = simulate.simulate
    with common.progress_bar("kernels") as advance:
        return selfcheck.check(layout, execute, centred=True, progress=advance)


def _row(check: Check) -> list[str]:
    error = "" if check.max_rel_error is None else f"{check.max_rel_error:.1e}"
    return [check.name, check.variant or "", "ok" if check.ok else "WRONG", error]


def _verdict(executor: str, checks: list[Check], layout: PageLayout) -> str:
    if executor == "reference":
        return "not checked: no GPU and no simulator here, so plain MLX operations do all the work"
    scheme = f"{layout.config.label}, head_dim {layout.head_dim}"
    wrong = [check for check in checks if not check.ok]
    where = f"on the {EXECUTORS[executor]}"
    if wrong:
        return f"not ok: {len(wrong)} of {len(checks)} checks failed {where} ({scheme})"
    return f"ok: every kernel agrees with plain MLX operations {where} ({scheme})"
