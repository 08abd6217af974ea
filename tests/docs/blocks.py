"""The fenced blocks of the documentation, and what their commands mean, without running them."""

import argparse
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from vllm_metal_tq import cli
from vllm_metal_tq.integrations.vllm.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "metal" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SHELL = ("sh", "bash", "shell", "console")

RUN = {
    "tiny": "with a tiny model in place of what --model names",
    "slow": "as it is, demo model and all",
    "server": "until it listens, with a tiny model",
    "client": "against such a server",
}
NOT_RUN = {
    "mac": "needs a Mac with Apple silicon",
    "nvidia": "needs an NVIDIA GPU",
    "vllm": "needs vLLM, and vllm-metal where it serves",
    "network": "downloads what no test should",
    "checkout": "sets up a checkout, or runs all of its tests",
    "home": "writes into the home folder",
    "long": "takes minutes to hours",
}
"""Marks of shell blocks, ``<!-- test: MARK -->`` on the line above, and why a test does not run."""

_FENCE = re.compile(
    r"(?:^ *<!-- test: (?P<mark>.*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file.
        line: of its first fence.
        language: what stands after the fence.
        mark: how it is tested, or None.
        text: its lines.
    """

    page: Path
    line: int
    language: str
    mark: str | None
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read(page: Path, text: str | None = None) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8") if text is None else text
    return [
        Block(
            page,
            text.count("\n", 0, found.start("indent")) + 1,
            found["language"],
            found["mark"],
            textwrap.dedent(found["text"]),
        )
        for found in _FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in read(page)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language in SHELL]
PYTHON_PAGES = {
    page: [block for block in BLOCKS if block.page == page and block.language == "python"]
    for page in PAGES
}


class Refused(Exception):  # noqa: N818 (an answer)
    """A command that would not do what its page says."""


def check_shell(text: str) -> None:
    """Check a shell block without running it.

    Raises:
        Refused: the shell cannot read it, or a program, target, extra, file or flag is unknown.
    """
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr)
    for words in commands(text):
        name = Path(words[0]).name
        if name not in _CHECKS:
            raise Refused(f"no check for {words[0]!r}")
        _CHECKS[name](words[1:])


def commands(text: str) -> list[list[str]]:
    """The words of each command, without redirections and what a pipe hands on."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found.append(words)
                words = []
            else:
                words.append(word)
    return [_without_redirections(words) for words in found if words]


def _without_redirections(words: list[str]) -> list[str]:
    ends = [i for i, word in enumerate(words) if set(word) <= set("<>")]
    words = words[: ends[0]] if ends else words
    while words and re.fullmatch(r"\w+=.*", words[0]):  # the environment of this command
        words = words[1:]
    return words


class _Parsed(Exception):  # noqa: N818 (no error: arguments are fine)
    pass


def _parse_with(run) -> None:
    """Call ``run`` up to the point where its parser has taken the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def only(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise _Parsed

    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", only):
            run()
    except _Parsed:
        return
    except SystemExit as stop:
        if stop.code == 0:  # --help, --version
            return
        raise Refused("its arguments are refused, see standard error") from None
    raise Refused("it takes no arguments")


def _our_command(words: list[str]) -> None:
    _parse_with(lambda: cli.main(words))


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        if words[1] not in ("pip", "pytest", "venv"):
            raise Refused(f"python -m {words[1]} is unknown")
        return
    file = ROOT / words[0]
    if not file.is_file():
        raise Refused(f"there is no {words[0]}")
    if len(words) == 1:
        return

    def run():
        with mock.patch.object(sys, "argv", [words[0], *words[1:]]):
            runpy.run_path(str(file), run_name="__main__")

    _parse_with(run)


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if "=" not in word and word not in targets:
            raise Refused(f"make has no target {word!r}")


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        for extra in re.findall(r"\[([\w,]+)\]$", word):
            if unknown := set(extra.split(",")) - set(project["optional-dependencies"]):
                raise Refused(f"there is no extra {unknown.pop()!r}")


def _vllm(words: list[str]) -> None:
    for flag, value in itertools.pairwise(words):
        if flag == "--additional-config":
            try:
                if Settings.parse(json.loads(value)) is None:
                    raise Refused(f"{value} leaves it off")
            except ValueError as error:
                raise Refused(str(error)) from None


def _launch(words: list[str]) -> None:
    if "--" not in words:
        raise Refused("mlx.launch reads the flags of what it launches where there is no --")
    program, *arguments = words[words.index("--") + 1 :]
    _CHECKS[Path(program).name](arguments)


def _anything(words: list[str]) -> None:
    """A program of the system, whose arguments are its own."""


_CHECKS = {
    "vllm-metal-tq": _our_command,
    "python": _python,
    "python3": _python,
    "make": _make,
    "pip": _pip,
    "vllm": _vllm,
    "mlx.launch": _launch,
    "mlx.distributed_config": _anything,
} | dict.fromkeys(("apt-get", "brew", "cd", "curl", "echo", "git", "source", "sudo"), _anything)
