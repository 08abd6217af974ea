"""The command ``vllm-metal-tq``, a module for each subcommand."""

from __future__ import annotations

import os
import sys
import traceback

from .. import openblas
from . import bench as bench_command
from . import cache_prompt as cache_prompt_command
from . import calibrate as calibrate_command
from . import doctor as doctor_command
from . import eval as eval_command
from . import exit_status, shell_completion
from . import generate as generate_command
from . import plan as plan_command
from . import serve as serve_command
from .parser import Parser, build

COMMANDS = {
    "generate": generate_command,
    "cache-prompt": cache_prompt_command,
    "serve": serve_command,
    "eval": eval_command,
    "plan": plan_command,
    "calibrate": calibrate_command,
    "bench": bench_command,
    "doctor": doctor_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the command's name; those of the process by default.

    Returns:
        The exit status, one of ``exit_status.MEANINGS``.

    Raises:
        SystemExit: the arguments cannot be parsed, or ask for help alone.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here a closed pipe can still be caught
    except BrokenPipeError:
        # The interpreter flushes again when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_status.CLOSED_PIPE
    except KeyboardInterrupt:
        return exit_status.INTERRUPTED


def whole_parser() -> Parser:
    """The parser of the command with all its subcommands."""
    parser = build(COMMANDS)
    shell_completion.add_argument(parser)
    return parser


def _run(argv: list[str] | None) -> int:
    args = whole_parser().parse_args(argv)
    if not sys.stderr.isatty():  # which mlx_lm's downloads do not look at
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        # Before the first import of mlx, which the commands do in run().
        if (complaint := openblas.preload()) and _on_cpu():
            print(complaint, file=sys.stderr)
        return COMMANDS[args.command].run(args) or exit_status.DONE
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Say in one line what went wrong; returns the exit status."""
    line = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    if isinstance(error, OSError) and error.filename:
        line = f"{error.filename!r}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        print(f"error: {line}", file=sys.stderr)
        return exit_status.BAD_INPUT
    name = type(error).__name__
    print(f"unexpected error: {name}: {line} (--debug shows where)", file=sys.stderr)
    return exit_status.UNEXPECTED


def _on_cpu() -> bool:
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.cpu)
