"""Completion of the command line in shells: a script that ``shtab`` makes of the parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..config import PRESETS, QUANT_NAMES
from .parser import every

SHELLS = ("bash", "zsh", "fish", "tcsh")

CHOICES = {"preset": tuple(PRESETS), "k_quant": tuple(QUANT_NAMES), "v_quant": tuple(QUANT_NAMES)}
"""What completes an argument that the parser itself leaves open, for errors of our own."""
FILES = ("calibration", "csv", "gsm8k", "output", "plot", "prompt_cache_file", "text")
FOLDERS = ("adapter_path", "draft_model", "model", "out")


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--print-completion``, which prints the script for a shell and exits."""
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print a script that makes the shell complete this command",
    )


class _PrintCompletion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        import shtab

        for own in every(parser):
            for action in own._actions:
                if action.dest in CHOICES:
                    action.choices = CHOICES[action.dest]
                elif action.dest in FILES:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
                elif action.dest in FOLDERS:
                    action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, str(values)))
        parser.exit()
