"""The command ``vllm-metal-tq``, a module for each subcommand."""

from __future__ import annotations

import argparse
import sys

from .. import __version__, openblas
from . import bench as bench_command
from . import cache_prompt as cache_prompt_command
from . import calibrate as calibrate_command
from . import doctor as doctor_command
from . import eval as eval_command
from . import generate as generate_command
from . import plan as plan_command
from . import serve as serve_command

_COMMANDS = {
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

    Returns:
        The exit status: 0, 1 where ``doctor`` finds a fault, 2 for bad input, 130 for an interrupt.
    """
    args = _parser().parse_args(argv)
    # Before the first import of mlx, which the commands do in run().
    if (complaint := openblas.preload()) and _on_cpu():
        print(complaint, file=sys.stderr)
    try:
        return _COMMANDS[args.command].run(args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _on_cpu() -> bool:
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.cpu)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-metal-tq", description="TurboQuant KV-cache compression for MLX"
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").split("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return parser
