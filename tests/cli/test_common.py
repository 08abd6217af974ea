import json
import os
import pty
import re
import subprocess
import sys

import pytest
from mlx.utils import tree_flatten
from models import llama

from vllm_metal_tq import demo_model
from vllm_metal_tq.cli import common, main
from vllm_metal_tq.integrations.mlx_lm import measure

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-9]|4[0-9]|9[0-7]|10[0-7])[;m]")

SHOW = """
import time
from vllm_metal_tq.cli import common
with common.progress_bar("work") as advance:
    print("said meanwhile")
    for done in range(3):
        advance(done + 1, 3)
        time.sleep(0.2)
common.print_table({"name": "figure"})
common.print_columns(["header"], [["cell"]])
"""


@pytest.fixture
def shown(monkeypatch):
    """Runs SHOW with each stream at a terminal or in a pipe; returns what each of them got."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def shown(stdout, stderr, **environment):
        streams = [pty.openpty() if kind == "terminal" else os.pipe() for kind in (stdout, stderr)]
        out, err = (writing for _, writing in streams)
        command = [sys.executable, "-c", SHOW]
        subprocess.run(
            command, stdout=out, stderr=err, env=os.environ | environment, check=True, timeout=60
        )
        return [everything(*stream) for stream in streams]

    return shown


def everything(reading, writing):
    os.close(writing)
    text = b""
    while chunk := read(reading):
        text += chunk
    os.close(reading)
    return text.decode()


def read(reading):
    try:
        return os.read(reading, 65536)
    except OSError:  # how Linux ends a terminal
        return b""


def test_a_terminal_gets_a_progress_bar_in_colour(shown):
    out, err = shown("terminal", "terminal")
    assert "work" in err
    assert "3/3" in err
    assert COLOUR.search(err)
    assert "figure" in out


def test_no_color_is_obeyed(shown):
    out, err = shown("terminal", "terminal", NO_COLOR="1")
    assert "work" in err
    assert not COLOUR.search(out + err)


def test_pipes_get_plain_text_and_no_progress(shown):
    out, err = shown("pipe", "pipe")
    assert err == ""
    assert out.startswith("said meanwhile\n")
    assert "figure" in out
    assert "\x1b" not in out


def test_no_progress_in_a_pipe_even_where_colours_are_forced(shown):
    assert shown("pipe", "pipe", FORCE_COLOR="1")[1] == ""


def test_progress_keeps_out_of_what_is_piped(shown):
    out, err = shown("pipe", "terminal")
    assert "3/3" in err
    assert "said meanwhile" not in err
    assert out.startswith("said meanwhile\n")
    assert "\x1b" not in out


def test_weights_are_read_with_their_bytes_counted(bars):
    model = llama(head_dim=16)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    common._read_weights(model)
    assert bars["weights"][-1] == (total, total)
    assert len(bars["weights"]) == len(tree_flatten(model.parameters()))


@pytest.mark.parametrize(
    ("command", "labels"),
    [
        (
            ["generate", "-p", "a b c", "-m", "3", "--json", "--prefill-step-size", "16"],
            {"calibrate", "demo model", "prompt", "generate"},
        ),
        (["generate", "-p", "a b c", "-m", "3"], {"calibrate", "demo model", "prompt"}),
        (
            ["eval", "--window", "64", "--tokens", "32"],
            {"calibrate", "demo model", "eval"},
        ),
        (
            ["calibrate", "--tokens", "64", "--output", "FILE"],
            {"calibrate", "demo model"},
        ),
        (
            ["generate", "-p", "a b c", "-m", "1", "--model", "FOLDER"],
            {"calibrate", "import mlx_lm", "weights", "prompt"},
        ),
        (
            ["cache-prompt", "-p", "a b c", "--prompt-cache-file", "FILE"],
            {"calibrate", "demo model", "prompt", "save"},
        ),
    ],
)
def test_long_work_has_a_progress_bar_to_its_end(
    bars, monkeypatch, capsys, tmp_path, command, labels
):
    monkeypatch.setattr(measure, "CALIBRATION_TOKENS", 64)
    file = str(tmp_path / "x.safetensors")
    places = {"FILE": file, "FOLDER": str(demo_model.folder())}
    command = [places.get(word, word) for word in command]
    assert main([command[0], "--model", "demo", *command[1:]]) == 0
    assert set(bars) == labels
    for label in labels & {"prompt", "generate", "eval", "weights"}:
        done, total = bars[label][-1]
        assert 0 < done <= total, label
    if "--json" in command:
        json.loads(capsys.readouterr().out)
