import json
import subprocess
import sys

import pytest

from vllm_metal_tq.cli import main
from vllm_metal_tq.plan import machine

LLAMA = ("--model", "llama-3.2-1b", "--memory", "8GB")
ROW = {
    *("preset", "bytes_per_token", "max_context", "max_concurrency", "fits", "weight_bytes"),
    *("working_set_bytes", "decode_tps", "decode_context", "note"),
}
SCHEMES = ["bf16", "mlx_lm 8-bit", "mlx_lm 4-bit", "tq8", "tq6", "tq4", "tq3", "tq2"]


def plan(capsys, *flags):
    status = main(["plan", *flags])
    return status, *capsys.readouterr()


def answer(capsys, *flags):
    status, out, _ = plan(capsys, *flags, "--json")
    assert status == 0
    return json.loads(out)


@pytest.fixture(autouse=True)
def no_mac(monkeypatch):
    monkeypatch.setattr(machine, "this_mac", lambda: None)


def test_json_has_all_schemes(capsys):
    found = answer(capsys, *LLAMA, "--weights-bits", "4")
    assert set(found) == {"model", "memory_bytes", "kv_budget_bytes", "rows"}
    assert [row["preset"] for row in found["rows"]] == SCHEMES
    assert all(set(row) == ROW for row in found["rows"])
    bf16, tq4 = found["rows"][0], found["rows"][5]
    assert (found["model"], found["memory_bytes"]) == ("llama-3.2-1b", 8 << 30)
    assert tq4["working_set_bytes"] == (8 << 30) * 2 // 3
    left = tq4["working_set_bytes"] - tq4["weight_bytes"]
    assert found["kv_budget_bytes"] == int(0.8 * left)
    assert tq4["bytes_per_token"] == 8704
    assert tq4["max_context"] > 3 * bf16["max_context"]
    assert (tq4["decode_tps"], tq4["fits"]) == (None, None)


def test_widths_that_are_named_get_a_row(capsys):
    rows = answer(capsys, *LLAMA, "--k-quant", "q8_0", "--v-quant", "q3_0")["rows"]
    assert rows[-1]["preset"] == "q8_0/q3_0"
    assert rows[-1]["bytes_per_token"] == 16 * 8 * 92
    assert len(answer(capsys, *LLAMA, "--k-quant", "q4_0")["rows"]) == len(SCHEMES)  # is tq4


def test_a_stated_budget_is_taken_as_it_is(capsys):
    found = answer(capsys, *LLAMA, "--kv-budget", "1270784000", "--engine", "vllm")
    assert found["kv_budget_bytes"] == 1_270_784_000
    bf16, quantised = found["rows"][:2]
    assert bf16["max_context"] == 38_768 - 16  # vLLM keeps a block for itself
    assert (quantised["max_context"], quantised["note"]) == (None, "vLLM does not offer it")


def test_a_budget_above_what_the_weights_leave_is_pointed_out(capsys):
    flags = (*LLAMA, "--weights-bits", "4", "--kv-budget")
    words = "--kv-budget is more than the weights leave, 4.69 GiB"
    assert words in plan(capsys, *flags, "6GB")[1]
    assert words not in plan(capsys, *flags, "5GB")[1]


def test_the_table_says_what_fits_and_what_is_an_estimate(capsys):
    flags = ("--context", "65536", "--concurrency", "2", "--chip", "M1", "--kv-budget", "2GB")
    status, out, _ = plan(capsys, *LLAMA, *flags)
    assert status == 0
    for words in ("a process may use (estimate)", "1,235,814,400", "tq4", "tok/s, estimate"):
        assert words in out
    assert "fits 2 x 65,536" in out
    assert "an estimate from above" in out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 4}
    assert " no " in lines["bf16"]
    assert " yes " in lines["tq4"]


def test_a_mac_says_itself_what_a_process_may_use(capsys, monkeypatch):
    here = machine.Machine(16 << 30, 11 << 30, measured=True)
    monkeypatch.setattr(machine, "this_mac", lambda: here)
    model = LLAMA[:2]
    asked = [(), ("--memory", "16GB"), ("--memory", "8GB")]
    found = [answer(capsys, *model, *memory)["rows"][0]["working_set_bytes"] for memory in asked]
    assert found == [11 << 30, 11 << 30, (8 << 30) * 2 // 3]
    assert "says this Mac" in plan(capsys, *model)[1]
    assert "estimate" in plan(capsys, *LLAMA)[1]


@pytest.mark.parametrize(("variable", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_the_table_is_coloured_unless_nobody_wants_it(capsys, monkeypatch, variable, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(variable, "1")
    _, out, _ = plan(capsys, *LLAMA)
    assert ("\x1b[1;36mtq4" in out) == coloured


def test_a_model_that_an_engine_refuses_says_why(capsys):
    rows = answer(capsys, "--model", "gpt-oss-20b", "--memory", "24GB")["rows"]
    notes = {row["preset"]: (row["max_context"], row["note"]) for row in rows}
    assert notes["bf16"][0] > 50_000
    assert notes["mlx_lm 4-bit"] == (None, "mlx_lm quantises no sliding windows")


def test_figures_are_whole_in_a_narrow_terminal_and_notes_come_once(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    flags = ("--weights-bits", "4", "--context", "8192", "--chip", "M1")
    _, out, _ = plan(capsys, "--model", "gpt-oss-20b", "--memory", "24GB", *flags)
    assert "1,250,608" in out
    assert "…" not in out
    assert out.count("mlx_lm 8-bit, mlx_lm 4-bit: mlx_lm quantises no sliding windows") == 1


def test_the_plot_is_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert plan(capsys, *LLAMA, "--plot", str(file))[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_help_loads_neither_mlx_nor_matplotlib():
    code = (
        "import sys; from vllm_metal_tq.cli import whole_parser; whole_parser().format_help(); "
        "sys.exit(any(name in sys.modules for name in ('mlx.core', 'mlx_lm', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory", "0GB"), "--memory '0GB' is no size"),
        (("--memory", "-8GB"), "--memory '-8GB' is no size"),
        (("--memory", "big"), "--memory 'big' is no size: expected such as 8GB or 512MB"),
        (("--memory", "1GB"), "weights of llama-3.2-1b take 2.30 GiB, a process may use 0.67 GiB"),
        (("--context", "0"), "--context 0 must be at least 1"),
        (("--concurrency", "-1"), "--concurrency -1 must be at least 1"),
        (("--context", "1" + "0" * 400), "must be at most 1099511627776"),
        (("--weights-bits", "7"), "7 bits a weight: allowed are 2, 3, 4"),
        (("--kv-budget", "0"), "--kv-budget '0' is no size"),
        (("--chip", "M0"), "--chip 'M0' is unknown: allowed are M1"),
        (("--engine", "x"), "--engine 'x' is unknown: allowed are mlx_lm, vllm"),
        (("--k-quant", "q9_0"), "k_quant 'q9_0' is unknown"),
        (("--plot", "nowhere/plan.png"), "nowhere"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, flags, message):
    flags = tuple(f"{flags[0]}={value}" for value in flags[1:])
    status, out, err = plan(capsys, *LLAMA, *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_memory_is_needed_where_there_is_no_mac(capsys):
    status, _, err = plan(capsys, *LLAMA[:2])
    assert status == 2
    assert "--memory is needed, such as 8GB" in err
