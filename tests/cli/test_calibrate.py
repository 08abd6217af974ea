import json

import pytest

from vllm_metal_tq import calibration
from vllm_metal_tq.cli import main
from vllm_metal_tq.integrations.mlx_lm import measure


def calibrate(capsys, *flags):
    status = main(["calibrate", "--model", "demo", *flags])
    return status, *capsys.readouterr()


def test_json_says_what_was_written_where(capsys, demo, tmp_path):
    file = tmp_path / "c.safetensors"
    status, out, _ = calibrate(capsys, "--tokens", "100", "--output", str(file), "--json")
    assert status == 0
    assert json.loads(out) == {
        "model": "demo",
        "file": str(file),
        "bytes": file.stat().st_size,
        "tokens": 100,
        "layers_calibrated": 30,
        "layers": 30,
        "widths": None,
    }
    assert len(calibration.load(file, demo[0]).centres) == 30


def test_a_text_of_ones_own_goes_where_it_is_found(capsys, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "user_cache_path", lambda name: tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    _, out, _ = calibrate(capsys, "--text", str(text))
    assert out.splitlines()[-1] == str(calibration.place(demo[0]))
    assert calibration.find(demo[0]) is not None


def test_the_first_use_of_a_model_calibrates_it_once(capsys, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(measure, "CALIBRATION_TOKENS", 64)
    generate = ["generate", "--model", "demo", "-m", "1", "--json"]
    assert main([*generate, "--no-calibrate"]) == 0
    assert calibration.find(demo[0]) is None
    assert main(generate) == 0
    made = calibration.place(demo[0])
    before = made.stat().st_mtime_ns
    assert main(generate) == 0
    assert made.stat().st_mtime_ns == before
    made.write_bytes(made.read_bytes()[:-10])  # cut short
    capsys.readouterr()
    assert main(generate) == 2
    error = capsys.readouterr().err
    assert "is damaged or foreign" in error
    assert "make it anew with `vllm-metal-tq calibrate`" in error


def test_a_calibration_that_cannot_be_kept_serves_all_the_same(
    capsys, caplog, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(calibration, "user_cache_path", lambda name: tmp_path / "file" / name)
    monkeypatch.setattr(measure, "CALIBRATION_TOKENS", 64)
    assert main(["generate", "--model", "demo", "-m", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 1
    assert caplog.messages[0].startswith("the calibration is not kept: ")


def test_widths_chosen_within_a_budget_serve_where_none_are_named(capsys, tmp_path, monkeypatch):
    from vllm_metal_tq import budget

    figures = [(1.0 + i, 2.0) for i in range(30)]
    monkeypatch.setattr(budget, "sensitivities", lambda *args: figures)
    file = str(tmp_path / "c.safetensors")
    flags = ("--tokens", "96", "--budget-bits", "4.0", "--output", file, "--json")
    widths = json.loads(calibrate(capsys, *flags)[1])["widths"]
    assert widths.count("=") == 30
    use = ["eval", "--model", "demo", "--calibration", file, "--window", "64", "--tokens", "8"]
    assert main([*use, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_element"] == pytest.approx(4.0, abs=0.04)
    assert main([*use, "--json", "--preset", "tq8"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_element"] == 7.25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "63"], "--tokens 63 must be at least 64"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--tokens", "64", "--budget-bits", "2"], "2.0 bits are too few"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, flags, message):
    status, out, err = calibrate(capsys, *flags)
    assert (status, out) == (2, "")
    assert message in err
