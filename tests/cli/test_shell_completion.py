import shutil
import subprocess

import pytest

from vllm_metal_tq.cli import main, shell_completion, whole_parser
from vllm_metal_tq.cli.parser import every
from vllm_metal_tq.config import PRESETS, QUANT_NAMES


def script(capsys, shell):
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def completed(capsys, tmp_path):
    """What bash completes a command line with, at its end."""
    file = tmp_path / "completion.bash"
    file.write_text(script(capsys, "bash"))

    def completed(*words):
        ask = (
            f'source "{file}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            "_shtab_vllm_metal_tq vllm-metal-tq; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        command = ["bash", "-c", ask, "bash", "vllm-metal-tq", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stderr == ""
        return done.stdout.split()

    return completed


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ge"], ["generate"]),
        (["bench", "d"], ["decode"]),
        (["generate", "--preset", "tq"], [*PRESETS]),
        (["eval", "--k-quant", ""], [*QUANT_NAMES]),
        (["bench", "encode", "--v-quant", "uint"], ["uint2", "uint4", "uint8"]),
        (["serve", "--kv-"], ["--kv-budget"]),
        (["generate", "--calibration", "comp"], ["completion.bash"]),
        (["generate", "--model", "comp"], []),  # a file is no folder
    ],
)
def test_bash_completes(completed, words, expected):
    assert completed(*words) == expected


@pytest.mark.parametrize("shell", shell_completion.SHELLS)
def test_every_shell_gets_a_script(capsys, shell):
    text = script(capsys, shell)
    for words in ("vllm-metal-tq", "cache-prompt", "tq4", "q8_0"):
        assert words in text
    if shutil.which(shell) and shell != "tcsh":  # which cannot only parse
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_what_completes_is_an_argument_of_some_command():
    known = {action.dest for parser in every(whole_parser()) for action in parser._actions}
    completing = {*shell_completion.CHOICES, *shell_completion.FILES, *shell_completion.FOLDERS}
    assert completing <= known


def test_choices_that_complete_do_not_replace_our_own_error(capsys):
    assert main(["generate", "--model", "demo", "--preset", "tq5"]) == 2
    assert "preset 'tq5' is unknown: allowed are tq8" in capsys.readouterr().err


def test_every_flag_that_takes_a_file_completes_files():
    for parser in every(whole_parser()):
        for action in parser._actions:
            if action.metavar == "FILE":
                assert action.dest in shell_completion.FILES
