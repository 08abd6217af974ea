import json
import sys

import pytest

from vllm_metal_tq.cli import main

FIELDS = {
    "ppl",
    "ppl_reference",
    "dppl_percent",
    "kl_mean",
    "kl_p99",
    "top1",
    "bits_per_element",
    "tokens",
    "preset",
    "k_quant",
    "v_quant",
}


def evaluate(capsys, *flags):
    status = main(["eval", "--model", "demo", *flags])
    return status, *capsys.readouterr()


def test_json_has_the_figures(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    flags = ("--text", str(text), "--window", "64", "--tokens", "32", "--preset", "tq8", "--json")
    status, out, _ = evaluate(capsys, *flags)
    figures = json.loads(out)
    assert status == 0
    assert set(figures) == FIELDS
    assert figures["tokens"] == 32
    assert figures["bits_per_element"] == 7.25


def test_the_shipped_text_and_the_table_need_no_flags(capsys):
    _, out, _ = evaluate(capsys, "--window", "64", "--tokens", "32")
    for words in ("tq4", "4.25", "perplexity", "KL mean", "top-1"):
        assert words in out


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("too short", [], "the text has 2 tokens: a window of 1024 needs 1025"),
        ("", [], "is empty"),
        ("words " * 100, ["--window", "2"], "window 2 must be at least 4"),
        ("words " * 100, ["--tokens", "0"], "tokens 0 at least 1"),
        (b"\xff\xfe\x00", [], "is not UTF-8"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, tmp_path, content, flags, message):
    text = tmp_path / "text.txt"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = evaluate(capsys, "--text", str(text), *flags)
    assert (status, out) == (2, "")
    assert message in err


def test_a_missing_text_is_named(capsys):
    status, _, err = evaluate(capsys, "--text", "nowhere.txt")
    assert status == 2
    assert "nowhere.txt" in err


@pytest.mark.slow
def test_needle_reports_every_depth(capsys, tmp_path):
    flags = ("--needle", "--window", "200", "--depths", "2", "--preset", "tq8")
    status, out, _ = evaluate(capsys, *flags, "--json", "--out", str(tmp_path))
    figures = json.loads(out)
    assert status == 0
    assert [trial["depth"] for trial in figures["trials"]] == [0, 1]
    assert figures["found_reference"] == 2
    assert figures["found"] == sum(trial["found"] for trial in figures["trials"])
    assert json.loads((tmp_path / "needle.json").read_text()) == figures
    assert "| 100 % | " in (tmp_path / "needle.md").read_text()


def test_the_needle_table_shows_both_answers(capsys):
    _, out, _ = evaluate(capsys, "--needle", "--window", "150", "--depths", "1", "--preset", "tq8")
    for words in ("tq8", "uncompressed", "0 %", "1 of 1"):
        assert words in out


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    lines = [
        json.dumps({"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"})
        for i in range(4)
    ]
    file.write_text("\n".join(lines))
    return str(file)


@pytest.mark.slow
def test_gsm8k_reports_both_caches(capsys, problems):
    flags = ("--gsm8k", problems, "--questions", "1", "--shots", "3", "--max-tokens", "12")
    status, out, _ = evaluate(capsys, *flags, "--preset", "tq8", "--json")
    figures = json.loads(out)
    assert status == 0
    assert (figures["questions"], figures["shots"], figures["preset"]) == (1, 3, "tq8")
    assert {figures["accuracy"], figures["accuracy_reference"]} <= {0, 1}
    _, out, _ = evaluate(capsys, *flags)
    for words in ("tq4", "right", "uncompressed", "same number"):
        assert words in out


def test_a_sweep_writes_json_markdown_and_a_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ("--sweep", "--schemes", "tq8,q4_0/q2_0", "--window", "64", "--tokens", "32")
    status, out, _ = evaluate(capsys, *flags, "--no-tail", "--out", str(tmp_path), "--json")
    figures = json.loads(out)
    assert status == 0
    assert [point["name"] for point in figures["points"]] == [
        "tq8 without tail",
        "q4_0/q2_0 without tail",
    ]
    assert [point["bits_per_element"] for point in figures["points"]] == [7.25, 3.25]
    assert all(point["frontier"] for point in figures["points"])
    assert json.loads((tmp_path / "sweep.json").read_text()) == figures
    assert "| tq8 without tail | 7.25 |" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_prints_a_table_sorted_by_bits(capsys):
    flags = ("--sweep", "--schemes", "tq8, tq2", "--window", "64", "--tokens", "32")
    _, out, _ = evaluate(capsys, *flags)
    assert "frontier" in out
    assert out.index("tq2") < out.index("tq8")


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out_dir = tmp_path / "results"
    status, out, err = evaluate(capsys, "--sweep", "--out", str(out_dir))
    assert (status, out) == (2, "")
    assert "pip install 'vllm-metal-tq[plot]'" in err
    assert not out_dir.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "3"], "--depths can be given with --needle only"),
        (["--needle", "--shots", "3"], "--shots can be given with --gsm8k only"),
        (["--needle", "--depths", "0"], "depths 0 must be at least 1"),
        (["--needle", "--window", "20"], "a context of 20 tokens is too short"),
        (["--gsm8k", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--sweep", "--preset", "tq4"], "choose them with --schemes"),
        (["--sweep", "--schemes", "tq4,tq9"], "preset 'tq9' is unknown"),
        (["--sweep", "--schemes", "q4_0/q9_0"], "v_quant 'q9_0' is unknown"),
        (["--sweep", "--schemes", ","], "preset '' is unknown"),
    ],
)
def test_bad_flags_of_a_mode_get_one_clear_line(capsys, flags, message):
    status, out, err = evaluate(capsys, *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_two_modes_at_once_are_refused(capsys):
    with pytest.raises(SystemExit):
        evaluate(capsys, "--needle", "--sweep")
