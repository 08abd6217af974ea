"""The command line in several processes, as mlx.launch starts it."""

import json
import sys

import pytest
import ranks
from platformdirs import user_cache_path

from vllm_metal_tq.cli import exit_status, main

RUN = "import sys; from vllm_metal_tq.cli import main; sys.exit(main())"
PROMPT = ("--prompt", "Why is the sky blue?")


def run(count, folder, *words):
    """The exit statuses of ``vllm-metal-tq WORDS``, and what each process said."""
    with ranks.started(count, folder, "-c", RUN, *words) as processes:
        statuses = ranks.wait(processes)
    return statuses, ranks.said(folder, count)


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("generate", ("--prompt", "-"), "--prompt - cannot be given with mlx.launch"),
        ("generate", (*PROMPT, "--draft-model", "demo"), "--draft-model cannot be given with"),
        ("serve", ("--adapter-path", "somewhere"), "--adapter-path cannot be given with"),
    ],
)
def test_what_several_processes_cannot_do_is_one_clear_error(
    command, flags, words, monkeypatch, capsys
):
    from vllm_metal_tq.integrations.mlx_lm import distributed

    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert main([command, "--model", "demo", *flags]) == exit_status.BAD_INPUT
    assert words in capsys.readouterr().err


def test_where_one_cannot_go_on_none_hangs(tmp_path):
    statuses, said = run(2, tmp_path, "generate", "--model", "/nowhere", *PROMPT)
    assert statuses == [exit_status.BAD_INPUT] * 2
    assert all("'/nowhere'" in text for text in said)


@pytest.mark.slow
def test_the_demo_models_text_under_mlx_launch_is_one_processs(tmp_path, user_cache, capsys):
    words = ["generate", "--model", "demo", *PROMPT, "--max-tokens", "8", "--json"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    # They find the demo model where it is, and beside it what one process has calibrated.
    ours = user_cache / "vllm-metal-tq"
    for folder in user_cache_path("vllm-metal-tq").glob("demo-model-*"):
        (ours / folder.name).symlink_to(folder)
    command = sys.executable, "-c", RUN, *words
    said = ranks.launch(3, tmp_path, *command, XDG_CACHE_HOME=str(user_cache))
    assert "exited with code" not in said  # mlx.launch itself always ends with 0
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert len(found) == 1, said  # the first process speaks, and no other
    assert found[0]["text"] == alone["text"]
    assert 3 * found[0]["kv_bytes"] == alone["kv_bytes"]
