"""The parser of the whole command line, put together from the modules of the subcommands."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from . import exit_status


class Parser(argparse.ArgumentParser):
    """A parser that answers bad input with one line, and whose help keeps its lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line without the usage, which may have thirty, and exit."""
        line = " ".join(message.split())  # it quotes what was given
        self.exit(exit_status.BAD_INPUT, f"error: {line} (see {self.prog} --help)\n")


def build(commands: Mapping[str, ModuleType]) -> Parser:
    """The parser of the command line.

    Args:
        commands: the module of each subcommand. The first line of its docstring is its summary,
            ``add_arguments(parser)`` adds its flags, and ``EXAMPLES`` has whole command lines for
            the help: at least one for the subcommand, or for each of its own subcommands.
    """
    parser = Parser(prog="vllm-metal-tq", description="TurboQuant KV-cache compression for MLX.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in commands.items():
        summary = (module.__doc__ or "").split("\n")[0].replace("`", "")
        command = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        for own in every(command):
            own.epilog = _titled("examples", _of(own.prog, examples(module)))
    firsts = [line for module in commands.values() for line in examples(module)[:1]]
    statuses = [f"{number:>3}  {text}" for number, text in exit_status.MEANINGS.items()]
    parser.epilog = "\n\n".join([_titled("examples", firsts), _titled("exit status", statuses)])
    for own in every(parser):
        own.add_argument(
            "--debug",
            action="store_true",
            # Else a subcommand's default would undo what was given before it.
            default=False if own is parser else argparse.SUPPRESS,
            help="show tracebacks of errors",
        )
    return parser


def examples(module: ModuleType) -> tuple[str, ...]:
    """The command lines that a subcommand's module gives as examples."""
    return tuple(getattr(module, "EXAMPLES", ()))


def arguments(example: str) -> list[str]:
    """The arguments in an example, without what the shell would take for itself."""
    words = shlex.split(example, comments=True)
    end = next((i for i, word in enumerate(words) if word in ("<", ">", "|")), len(words))
    return words[1:end]


def every(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands, at every depth."""
    yield parser
    for action in parser._actions:  # argparse has no public list of subcommands
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                yield from every(own)


def _of(prog: str, lines: Iterable[str]) -> list[str]:
    return [line for line in lines if f"{line} ".startswith(f"{prog} ")]


def _titled(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)])
