"""Work in a process of its own, whose memory nothing else has touched.

Only what needs no MLX is imported here, so that the new process can load OpenBLAS before it.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from .. import openblas

_YIELDED, _RETURNED, _FAILED = range(3)


class ProcessError(RuntimeError):
    """The process ended without a result, or its work raised what is no ValueError."""


def apart(work: Callable[..., Generator[Any, None, Any]], *args: Any) -> Generator[Any, None, Any]:
    """Run the generator ``work(*args)`` in a new process; yield and return what it does.

    Args:
        work: a function of a module, so that the new process can import it.
        args: what can be pickled, as must what ``work`` yields and returns.

    Raises:
        ValueError: ``work`` raised it, or an OSError.
        ProcessError: it raised something else, or the process was killed.
    """
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    with background(_run, sender, work, args) as process:
        sender.close()  # the process has its own: when that is closed, receiving ends
        while True:
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join()
                raise ProcessError(how_it_ended(process.exitcode)) from None
            if kind == _RETURNED:
                return value
            if kind == _FAILED:
                raise value
            yield value


def _run(sender: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more
        for message in _messages(work, args):
            sender.send(message)


def _messages(work: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[tuple[int, Any]]:
    try:
        generator = work(*args)
        while True:
            yield _YIELDED, next(generator)
    except StopIteration as end:
        yield _RETURNED, end.value
    except (ValueError, OSError) as error:
        yield _FAILED, _noted(ValueError(str(error)))
    except Exception as error:
        first = str(error).split("\n")[0]
        yield _FAILED, _noted(ProcessError(f"{type(error).__name__}: {first}"))


def _noted(error: Exception) -> Exception:
    """With the traceback of what is being handled, which would stay in this process."""
    error.add_note(traceback.format_exc())
    return error


@contextmanager
def background(work: Callable[..., None], *args: Any) -> Iterator[BaseProcess]:
    """Run ``work(*args)`` in a new process for as long as the context lasts."""
    target = multiprocessing.get_context("spawn").Process(
        target=_begin, args=(work, args), daemon=True
    )
    target.start()
    try:
        yield target
    finally:
        target.terminate()
        target.join()


def _begin(work: Callable[..., None], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us when it is interrupted
    openblas.preload()
    try:
        work(*args)
    except Exception as error:  # else a traceback would go to standard error
        sys.exit(f"{type(error).__name__}: {error}")


def how_it_ended(status: int | None) -> str:
    """What the exit status of a process says."""
    if status == -9:
        return "the system killed the process, as it does when memory runs out"
    return f"the process ended with status {status}"


def rss_high_water() -> int:
    """The most bytes of this process that were in memory at once.

    Linux's getrusage would start from what the parent held when it started this process, so the
    figure comes from /proc there.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def outcome(work: Generator[Any, None, Any]) -> Any:
    """What a generator returns, once it has run to its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
