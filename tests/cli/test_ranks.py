"""The command line in several processes, as mlx.launch starts it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import ranks

from vllm_metal_tq.cli import exit_status, main

RUN = "import sys; from vllm_metal_tq.cli import main; sys.exit(main())"
PROMPT = ("--prompt", "Why is the sky blue?")


def run(count, folder, *words, home=None):
    """The exit statuses of ``vllm-metal-tq WORDS``, and what each process said."""
    cache = {"XDG_CACHE_HOME": str(home)} if home else {}
    with ranks.started(count, folder, "-c", RUN, *words, **cache) as processes:
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
def test_the_demo_models_text_is_one_processs(tmp_path, user_cache, capsys):
    words = ["generate", "--model", "demo", *PROMPT, "--max-tokens", "8", "--json"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    # The demo model lies in the real cache directory, and so does what it was calibrated to.
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    statuses, said = run(3, tmp_path, *words, home=home)
    assert statuses == [0] * 3
    together = json.loads(said[0].splitlines()[-1])
    assert together["text"] == alone["text"]
    assert 3 * together["kv_bytes"] == alone["kv_bytes"]
    assert not any(text.strip().startswith("{") for text in said[1:])


SUM = (
    "import mlx.core as mx; group = mx.distributed.init(strict=True, backend='mpi'); "
    "from vllm_metal_tq.integrations.mlx_lm import distributed; "
    "print('most', distributed.most(group.rank() + 40), group.size())"
)


def test_mpi_agrees_as_the_ring_does():
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("needs Open MPI: apt-get install openmpi-bin libopenmpi-dev")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [mpirun, "-n", "2", "--oversubscribe", sys.executable, "-c", SUM],
        env=os.environ | root | {"PYTHONPATH": str(ranks.TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=ranks.SECONDS,
    )
    assert done.stdout.split("\n").count("most 41 2") == 2, done.stderr
