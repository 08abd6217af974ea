"""Processes that are killed while they save, and file systems that are full."""

import os
import random
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
import serve_load
from limits import largest_file
from models import PROMPT, llama, tokens

from vllm_metal_tq import atomic, calibration, load_prompt_cache, make_prompt_cache
from vllm_metal_tq import save_prompt_cache as save
from vllm_metal_tq.integrations.mlx_lm import calibrate

KILLS = 6
LENGTHS = (PROMPT, 400)  # of the two prompts that are saved by turns
# On a disk of its own that is full: user namespaces let anybody mount one.
FULL_DISK = """
set -e
mount -t tmpfs -o size=64k none "$1"
cp "$2" "$1"/
shift 2
exec "$@"
"""


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture
def file(model, tmp_path):
    save(tmp_path / "prompt.safetensors", filled(model, PROMPT), model)
    return tmp_path / "prompt.safetensors"


def filled(model, length):
    cache = make_prompt_cache(model)
    mx.eval(model(tokens(length), cache=cache))
    return cache


def others(file):
    return [other for other in file.parent.iterdir() if other != file]


def save_for_ever(file):
    """What the process does that is killed."""
    model = llama()
    caches = [filled(model, length) for length in LENGTHS]
    print("ready", flush=True)
    while True:
        for cache in caches:
            save(file, cache, model)


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_one_of_the_two_caches(model, file):
    chance = random.Random(1)
    code = "import sys, test_saved_faults; test_saved_faults.save_for_ever(sys.argv[1])"
    command = [sys.executable, "-c", code]
    places = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(KILLS):
        with subprocess.Popen([*command, file], stdout=subprocess.PIPE, env=places) as saver:
            assert saver.stdout.readline() == b"ready\n"
            time.sleep(chance.random() * 0.5)
            saver.kill()
        (length,) = {cache.offset for cache in load_prompt_cache(file, model)}
        assert length in LENGTHS
    assert all(other.name.endswith(atomic.SUFFIX) for other in others(file))


class TestADiskThatIsFull:
    def test_keeps_the_prompt_cache_that_was_there(self, model, file):
        cache = filled(model, 2000)
        size = sum(x.nbytes for layer in cache for x in layer.state)
        with largest_file(size // 2), pytest.raises(OSError, match="prompt cache") as found:
            save(file, cache, model)
        assert found.value.filename == str(file)
        assert f"it takes {size} bytes" in str(found.value)
        assert load_prompt_cache(file, model)[0].offset == PROMPT
        assert others(file) == []

    def test_keeps_the_calibration_that_was_there(self, model, tmp_path):
        file = tmp_path / "a.safetensors"
        measured = calibrate(model, tokens(100)[0].tolist())
        measured.save(file)
        with largest_file(100), pytest.raises(OSError, match="calibration cannot be written"):
            measured.save(file)
        again = calibration.load(file, model).centres
        for centre, before in zip(again, measured.centres, strict=True):
            assert (centre is None) == (before is None)
            if centre:
                np.testing.assert_array_equal(centre.mu, before.mu)
        assert others(file) == []

    @pytest.mark.slow
    def test_is_named_by_the_command_which_keeps_what_was_there(self, tmp_path):
        if not _can_mount():
            pytest.skip("this system gives ordinary users no file systems of their own")
        disk, kept, model = tmp_path / "disk", tmp_path / "prompt.safetensors", tmp_path / "model"
        for folder in (disk, model):
            folder.mkdir()
        serve_load.tiny_model(model)
        kept.write_bytes(b"what was there")
        file = disk / kept.name
        main = "import sys; from vllm_metal_tq.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", main, "cache-prompt", "--model", str(model)]
        command += ["--prompt", "a" * 3000, "--prompt-cache-file", str(file), "--no-calibrate"]
        check = 'shift; "$@"; status=$?; ls -A "$0"; cat "$0"/*; exit $status'
        mounted = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(disk), str(kept)]
        shell = [*mounted, "sh", "-c", check, str(disk), "-", *command]
        ended = subprocess.run(shell, capture_output=True, text=True)
        assert ended.returncode == 2, ended.stderr
        assert f"error: {str(file)!r}: the prompt cache cannot be written" in ended.stderr
        assert "No space left on device" in ended.stderr
        assert ended.stdout.split("\n")[-2:] == [kept.name, "what was there"]


def _can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
