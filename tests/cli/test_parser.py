import argparse
import re
from pathlib import Path

import pytest

from vllm_metal_tq.cli import COMMANDS, exit_status, main, whole_parser
from vllm_metal_tq.cli.parser import arguments, every, examples

EXAMPLES = [line for module in COMMANDS.values() for line in examples(module)]
COMMAND_LINE = Path(__file__).parents[2] / "docs" / "cli.md"


def printed_help(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_command_has_an_example_in_its_help():
    for parser in every(whole_parser()):
        assert re.search(rf"^  {parser.prog}\b", parser.epilog, re.MULTILINE), parser.prog


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_can_be_parsed(example):
    words = arguments(example)
    assert example.startswith(f"vllm-metal-tq {words[0]}")
    args = whole_parser().parse_args(words)
    assert args.command == words[0]


def test_an_example_that_cannot_be_parsed_would_be_found():
    with pytest.raises(SystemExit):
        whole_parser().parse_args(arguments("vllm-metal-tq generate --model demo --no-such-flag"))


def test_what_the_shell_takes_of_an_example_is_no_argument():
    assert arguments('vllm-metal-tq generate -p "a < b" < x | head') == ["generate", "-p", "a < b"]


def test_help_shows_examples_on_lines_of_their_own(capsys):
    for name, module in COMMANDS.items():
        lines = printed_help(capsys, name).splitlines()
        assert {f"  {example}" for example in examples(module)} <= set(lines)
    assert f"  {EXAMPLES[0]}" in printed_help(capsys).splitlines()


def test_exit_statuses_are_in_the_help_and_in_the_documentation(capsys):
    shown = printed_help(capsys)
    rows = COMMAND_LINE.read_text(encoding="utf-8")
    for number, meaning in exit_status.MEANINGS.items():
        assert f"{number:>3}  {meaning}" in shown
        assert f"| {number} | {meaning} |" in rows
    assert len(re.findall(r"^\| \d+ \|", rows, re.MULTILINE)) == len(exit_status.MEANINGS)


@pytest.mark.parametrize(
    "words",
    [["--debug", "doctor"], ["doctor", "--debug"], ["--debug", "bench", "encode"]],
)
def test_debug_goes_before_and_after_the_command(words):
    assert whole_parser().parse_args(words).debug is True


def test_debug_is_off_by_default():
    assert whole_parser().parse_args(["bench", "encode"]).debug is False


def test_arguments_that_cannot_be_parsed_get_one_line_without_the_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "encode", "--head-dim", "x"])
    assert stop.value.code == exit_status.BAD_INPUT
    assert capsys.readouterr().err == (
        "error: argument --head-dim: invalid int value: 'x' (see vllm-metal-tq bench encode --help)"
        "\n"
    )


def test_every_flag_is_explained():
    for parser in every(whole_parser()):
        for action in parser._actions:
            silent = isinstance(action, argparse._SubParsersAction)
            assert silent or action.help, (parser.prog, action.dest)


def test_an_error_of_the_parser_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "an\nargument\nof three lines"])
    assert stop.value.code == exit_status.BAD_INPUT
    line = "error: unrecognized arguments: an argument of three lines (see vllm-metal-tq --help)\n"
    assert capsys.readouterr().err == line
