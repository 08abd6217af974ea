"""What ``main`` makes of errors, interrupts and pipes that are closed."""

import os
import subprocess
import sys

import pytest

from vllm_metal_tq.cli import COMMANDS, exit_status, main


@pytest.fixture
def fails(monkeypatch):
    """Makes ``doctor`` raise what it is given."""

    def fails(error):
        def run(args):
            raise error

        monkeypatch.setattr(COMMANDS["doctor"], "run", run)

    return fails


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("3 is odd"), 2, "error: 3 is odd"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: 'x': No such file"),
        (OSError("disk is full"), 2, "error: disk is full"),
        (ValueError("first\nsecond"), 2, "error: first"),
        (KeyError("k"), 70, "unexpected error: KeyError: 'k' (--debug shows where)"),
        (
            RuntimeError("\n[metal] no memory\nmore"),
            70,
            "unexpected error: RuntimeError: [metal] no memory (--debug shows where)",
        ),
        (
            AssertionError(),
            70,
            "unexpected error: AssertionError: no reason given (--debug shows where)",
        ),
    ],
)
def test_an_error_is_one_line(capsys, fails, error, status, line):
    fails(error)
    assert main(["doctor"]) == status
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize(("error", "status"), [(ValueError("odd"), 2), (KeyError("k"), 70)])
def test_debug_shows_the_traceback_besides(capsys, fails, error, status):
    fails(error)
    assert main(["doctor", "--debug"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert "raise error" in err
    assert err.splitlines()[-1].startswith(("error: odd", "unexpected error: KeyError: 'k'"))


def test_an_interrupt_is_quiet(capsys, fails):
    fails(KeyboardInterrupt())
    assert main(["doctor"]) == exit_status.INTERRUPTED
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("argument", ["--help", "--print-completion=bash", "doctor"])
def test_a_closed_pipe_ends_it_quietly(argument, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = (
        "import sys; from vllm_metal_tq import cli\n"
        "cli.COMMANDS['doctor'].run = lambda args: print('a line')\n"
        "sys.exit(cli.main())"
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (exit_status.CLOSED_PIPE, "")


def test_help_needs_neither_mlx_nor_numpy():
    code = (
        "import sys; from vllm_metal_tq.cli import main\n"
        "try: main(['eval', '--help'])\n"
        "finally: print(*sorted({'mlx', 'numpy', 'mlx_lm', 'shtab'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    assert "examples:" in done.stdout


def test_downloads_show_no_progress_in_a_pipe(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    code = (
        "from vllm_metal_tq import cli\n"
        "def run(args):\n"
        "    from huggingface_hub.utils import are_progress_bars_disabled\n"
        "    print(are_progress_bars_disabled())\n"
        "cli.COMMANDS['doctor'].run = run\n"
        "cli.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
