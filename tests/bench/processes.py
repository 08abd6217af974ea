"""What the tests run in other processes."""

import os
import signal
import sys
import time

from vllm_metal_tq.bench.process import rss_high_water

MIB = 2**20


def count(end):
    yield from range(end)
    return "done"


def modules():
    yield from sys.modules


def refuse(error):
    yield 1
    raise error


def be_killed():
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def forget(size):
    """High-water marks before, with and after ``size`` bytes."""
    yield rss_high_water()
    held = bytearray(size)
    held[::4096] = bytes(len(held[::4096]))
    yield rss_high_water()
    del held
    yield rss_high_water()


def own_number():
    yield os.getpid()
    time.sleep(60)


def fail():
    raise RuntimeError("no room")


def sleep():
    time.sleep(60)
