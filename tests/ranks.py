"""Processes of this machine that hold a model together, over MLX's ring back-end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SECONDS = 300  # after which processes are killed, whatever they do


def _free_ports(count):
    """Ports that were free a moment ago."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in bound]


def _free_row(count):
    """The first of so many ports in a row that were free a moment ago."""
    while True:
        (first,) = _free_ports(1)
        try:
            with ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                return first
        except (OSError, OverflowError):
            continue


@contextmanager
def started(count, folder, *command):
    """So many processes of ``python COMMAND``; each writes what it says to ``folder/RANK.txt``.

    None outlives the block.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
    common = _environment(folder) | {"MLX_HOSTFILE": str(hosts)}
    processes = []
    try:
        for rank in range(count):
            with (folder / f"{rank}.txt").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=os.environ | common | ({"MLX_RANK": str(rank)} if count > 1 else {}),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def mpirun(count, folder, *command):
    """Run so many processes of ``python COMMAND`` over MPI.

    Returns:
        What they said where they failed, else "".
    """
    program = shutil.which("mpirun")
    if program is None:
        pytest.skip("needs Open MPI: apt-get install openmpi-bin libopenmpi-dev")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [program, "-n", str(count), "--oversubscribe", sys.executable, *command],
        env=os.environ | _environment(folder) | root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    return done.stdout if done.returncode else ""


def launch(count, folder, *command, **environment):
    """Run so many processes of ``COMMAND`` with mlx.launch, over its ring.

    None outlives the call.

    Returns:
        What all of them said, and mlx.launch of those that failed.
    """
    program = Path(sys.executable).with_name("mlx.launch")
    if not program.is_file():
        pytest.skip("needs mlx.launch, which comes with MLX")
    ring = "-n", str(count), "--backend", "ring", "--starting-port", str(_free_row(count))
    process = subprocess.Popen(
        [program, *ring, "--", *command],
        env=os.environ | _environment(folder) | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group, to be killed whole
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return output


def _environment(folder):
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    # More threads than cores only wait for each other.
    threads = {"OPENBLAS_NUM_THREADS": "1", "MLX_ENABLE_TF32": "0"}
    return {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder)} | threads


def wait(processes, seconds=SECONDS):
    """The exit statuses, None of a process that has not ended in time."""
    end = time.monotonic() + seconds
    statuses = []
    for process in processes:
        try:
            statuses.append(process.wait(max(end - time.monotonic(), 0.01)))
        except subprocess.TimeoutExpired:
            statuses.append(None)
    return statuses


def said(folder, count):
    """What each process wrote."""
    return [(folder / f"{rank}.txt").read_text(errors="replace") for rank in range(count)]
