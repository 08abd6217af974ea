import json

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
