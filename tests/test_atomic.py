"""A file that is being replaced is the old one or the new one, whatever ends its writer.

Writers run in processes of their own, which load ``atomic.py`` alone: hundreds of them start fast.
"""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import largest_file

from vllm_metal_tq import atomic

SIZE = 300_000
KILLS = 40
OLD, NEW = b"o" * SIZE, b"n" * SIZE
STEPS = ("before", "open", "half", "whole", "sync", "rename", "folder", "never")

LOAD = f"""
import importlib.util, itertools, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("atomic", {atomic.__file__!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
file, moment = pathlib.Path(sys.argv[1]), sys.argv[-1]
"""
KILLED_ONCE = """

def die(step):
    if step == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def dying(owner, name, steps):
    original = getattr(owner, name)
    def call(*args, **options):
        die(next(steps))
        return original(*args, **options)
    setattr(owner, name, call)

dying(os, "fsync", iter(["sync", "folder"]))
dying(pathlib.Path, "replace", iter(["rename"]))
die("before")
with atomic.replacing(file, "it", 1) as stream:
    die("open")
    stream.write(b"n" * 150_000)
    stream.flush()
    die("half")
    stream.write(b"n" * 150_000)
    die("whole")
"""
KILLED_ANY_TIME = """
print("ready", flush=True)
for letter in itertools.cycle(b"no"):
    with atomic.replacing(file, "it", 1) as stream:
        for _ in range(30):
            stream.write(bytes([letter]) * 10_000)
            stream.flush()
"""


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "kept.safetensors"
    file.write_bytes(OLD)
    return file


def unfinished(file):
    return [other for other in file.parent.iterdir() if other.name.endswith(atomic.SUFFIX)]


def write(file, some=lambda stream: stream.write(NEW)):
    with atomic.replacing(file, "the test", SIZE) as stream:
        some(stream)


def test_a_file_is_made_and_replaced_with_the_usual_rights(tmp_path):
    file, plain = tmp_path / "a [1] b*.safetensors", tmp_path / "plain"
    plain.touch()
    for content in (OLD, NEW):
        write(file, lambda stream, content=content: stream.write(content))
        assert file.read_bytes() == content
    assert file.stat().st_mode == plain.stat().st_mode
    assert sorted(tmp_path.iterdir()) == sorted([file, plain])


@pytest.mark.parametrize("step", STEPS)
def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new(file, step):
    ended = subprocess.run([sys.executable, "-c", LOAD + KILLED_ONCE, str(file), step])
    assert ended.returncode == (0 if step == "never" else -signal.SIGKILL)
    assert file.read_bytes() == (NEW if step in ("folder", "never") else OLD)
    assert len(unfinished(file)) == (step in ("open", "half", "whole", "sync", "rename"))


def test_writers_killed_at_random_moments_leave_the_old_or_the_new(file):
    chance, seen = random.Random(0), set()
    for _ in range(KILLS):
        command = [sys.executable, "-c", LOAD + KILLED_ANY_TIME, str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(chance.random() * 0.03)
            writer.kill()
        content = file.read_bytes()
        assert content in (OLD, NEW)
        seen.add(content)
    assert seen == {OLD, NEW}  # they did write
    left = unfinished(file)
    assert left  # and were killed in the middle
    for other in left:
        os.utime(other, (0, 0))
    write(file)
    assert unfinished(file) == []


def test_what_another_writer_is_about_to_finish_is_not_removed(file):
    with atomic.replacing(file, "the test", SIZE) as stream:
        stream.write(OLD[1:])
        (own,) = unfinished(file)
        os.utime(own, (0, 0))
        write(file)
        assert unfinished(file) == [own]
        assert file.read_bytes() == NEW
    assert file.read_bytes() == OLD[1:]
    assert unfinished(file) == []


def test_what_another_writer_has_only_begun_is_not_removed(file):
    begun = file.with_name(f".{file.name}.1234{atomic.SUFFIX}")
    begun.touch()
    write(file)
    assert unfinished(file) == [begun]


def test_other_files_unfinished_are_left_alone(file):
    other = file.with_name(f".{file.stem}.safetensors2.1234{atomic.SUFFIX}")
    other.touch()
    os.utime(other, (0, 0))
    write(file)
    assert unfinished(file) == [other]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_an_error_says_what_where_and_how_much(file, monkeypatch, code, where):
    def failing(*_):
        raise OSError(code, os.strerror(code))

    def write_some(stream):
        stream.write(NEW)
        if where == "write":
            failing()

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=r"the test cannot be written.*300000 bytes") as found:
        write(file, write_some)
    assert (found.value.errno, found.value.filename) == (code, str(file))
    assert os.strerror(code) in str(found.value)
    assert file.read_bytes() == OLD
    assert unfinished(file) == []


def test_a_limit_of_the_system_is_an_error(file):
    with largest_file(SIZE // 2), pytest.raises(OSError, match="File too large"):
        write(file)
    assert file.read_bytes() == OLD
    assert unfinished(file) == []


def test_where_neither_locks_nor_folders_can_be_synced(file, monkeypatch):
    def failing(*_):
        raise OSError(errno.ENOTSUP, "not here")

    synced = []

    def files_alone(descriptor):
        synced.append(Path(f"/dev/fd/{descriptor}").is_dir())
        if synced[-1]:
            failing()

    monkeypatch.setattr(atomic.fcntl, "flock", failing)
    monkeypatch.setattr(os, "fsync", files_alone)
    write(file)
    assert file.read_bytes() == NEW
    assert synced == [False, True]
