"""The planner's page shows what the planner says."""

import json

import pytest
from blocks import ROOT, commands, read
from tables import tables

from vllm_metal_tq.cli import main
from vllm_metal_tq.plan import machine

FIRST, SECOND = (
    commands(block.text)[0][1:]
    for block in read(ROOT / "docs" / "planner.md")
    if block.language == "sh"
)


@pytest.fixture(autouse=True)
def no_mac(monkeypatch):
    monkeypatch.setattr(machine, "this_mac", lambda: None)


@pytest.fixture
def rows(capsys):
    """A function from the arguments of ``plan`` to its rows, by preset."""

    def answered(*args):
        assert main([*args, "--json"]) == 0
        return {row["preset"]: row for row in json.loads(capsys.readouterr().out)["rows"]}

    return answered


def number(cell):
    return float(cell.replace(",", "").removesuffix("*"))


def test_the_first_table_is_what_the_command_above_it_says(rows):
    said = rows(*FIRST)
    shown = tables("planner")[0]
    assert [row["cache"] for row in shown] == list(said)
    for row in shown:
        answer = said[row["cache"]]
        assert number(row["bytes a token"]) == answer["bytes_per_token"]
        assert number(row["longest context"]) == answer["max_context"]
        assert row["longest context"].endswith("*") == (answer["max_context"] > 131_072)
        assert number(row["sequences of 4,096"]) == answer["max_concurrency"]
        assert row["tok/s, estimate"] == f"{answer['decode_tps']:.1f}"


def test_the_box_above_it_is_too(capsys):
    box = next(b for b in read(ROOT / "docs" / "planner.md") if not b.language)
    assert main(FIRST) == 0
    printed = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    for line in box.text.splitlines():
        assert line.split("│") in printed


@pytest.mark.parametrize(
    ("engine", "column"), [("mlx_lm", "one request, mlx_lm"), ("vllm", "one request, vLLM")]
)
def test_one_request_on_8_gb_is_what_the_second_command_says(rows, engine, column):
    said = rows(*SECOND, "--engine", engine)
    shown = next(table for table in tables("planner") if column in table[0])
    compared = {row["cache"]: number(row[column]) for row in shown if row[column]}
    assert compared == {name: said[name]["max_context"] for name in ("bf16", "q8_0/q3_0", "tq4")}
