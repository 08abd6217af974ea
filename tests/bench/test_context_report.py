import csv

import pytest

from vllm_metal_tq.bench.context import Step
from vllm_metal_tq.bench.context_report import MIB, Run, draw, markdown, write_csv

RUNS = [
    Run("bf16", [Step(1000, 2 * MIB, 5 * MIB, 9 * MIB, 123.44, 5.0)], "budget: too much"),
    Run("tq4", [], "failed: killed"),
]


def test_csv_has_a_line_for_each_step(tmp_path):
    write_csv(RUNS, str(tmp_path / "x.csv"))
    (row,) = csv.DictReader((tmp_path / "x.csv").open())
    assert row == {
        "cache": "bf16",
        "context": "1000",
        "kv_bytes": str(2 * MIB),
        "peak_bytes": str(5 * MIB),
        "rss_bytes": str(9 * MIB),
        "prefill_tps": "123.44",
        "decode_tps": "5.0",
    }


def test_markdown_says_where_each_cache_ended_and_why():
    lines = markdown({"machine": "M1"}, RUNS).splitlines()
    assert lines[0] == "- machine: M1"
    assert "| bf16 | 1,000 | 2.0 | 5.0 | 9.0 | 123.4 | 5.0 | budget: too much |" in lines
    assert "| tq4 |  |  |  |  |  |  | failed: killed |" in lines
    assert lines[-1] == "| bf16 | 1,000 | 2.0 | 5.0 | 9.0 | 123.4 | 5.0 |"
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert widths == [9, 9, 9, 9, 8, 8, 8]


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    draw(RUNS, str(tmp_path / "x.png"), "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
