"""Processes of this machine that hold a model together, over MLX's ring back-end."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

TESTS = Path(__file__).parent
SECONDS = 300  # after which processes are killed, whatever they do


def _free_ports(count):
    """Ports that were free a moment ago."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in bound]


@contextmanager
def started(count, folder, *command, **environment):
    """So many processes of ``python COMMAND``; each writes what it says to ``folder/RANK.txt``.

    None outlives the block.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    common = {"MLX_HOSTFILE": str(hosts), "PYTHONPATH": paths, "MLX_ENABLE_TF32": "0"}
    # More threads than cores only wait for each other.
    common |= {"OPENBLAS_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)} | environment
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
