"""What a fuzzing target is, and what its cases may come to: success or an error as documented."""

import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.strategies import SearchStrategy

SECONDS = 60  # that a case may take, on a machine that does much else
GROWTH = 256 << 20  # bytes by which a case may raise the most memory that the process ever held
REFUSALS = (ValueError, OSError)


@dataclass(frozen=True)
class Target:
    """One thing that takes input from outside.

    Attributes:
        name: as tables have it.
        count: cases of `make fuzz`.
        cases: makes cases: plain values, which ``repr`` writes so that Python reads them again.
        check: puts one case in. Returns what came of it; raises what may not come of it.
        close: ends what ``check`` began.
    """

    name: str
    count: int
    cases: SearchStrategy
    check: Callable[[Any], str]
    close: Callable[[], None] = lambda: None


class Finding(Exception):  # noqa: N818 (what it is)
    """Something came of a case that may not."""


def refusal(error: Exception) -> str:
    """Whether an error is a refusal as documented: of our kinds, with one line that says why."""
    if not isinstance(error, REFUSALS):
        raise Finding(f"{type(error).__name__} is no documented error: {error}") from error
    if not str(error).strip():
        raise Finding("an error says nothing") from error
    cause = error
    while cause:
        if isinstance(cause, MemoryError) or "allocate" in str(cause):
            raise Finding(f"memory was asked for before the case was refused: {cause}") from error
        cause = cause.__cause__ or cause.__context__
    return "refused"


def limited(check: Callable[[Any], str]) -> Callable[[Any], str]:
    """``check`` under a deadline and a bound on memory."""

    def limited_check(case: Any) -> str:
        before = peak_bytes()
        previous = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            came = check(case)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        if (grown := peak_bytes() - before) > GROWTH:
            raise Finding(f"the case took {grown >> 20} MiB of memory")
        return came

    return limited_check


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _too_long(*_: object) -> None:
    raise Finding(f"the case took longer than {SECONDS} s")


def run(
    target: Target,
    count: int,
    start: int | None = None,
    before: Callable[[Any], None] = lambda case: None,
) -> Counter:
    """Put ``count`` cases in, and count what came of them.

    Args:
        target: the target.
        count: how many cases.
        start: seed of the cases; None: always the same ones.
        before: sees every case before it is put in.

    Raises:
        Finding: something came of a case that may not; the last case is the smallest such one.
    """
    came: Counter = Counter()
    check = limited(target.check)

    @settings(
        max_examples=count,
        derandomize=start is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,  # a case may be a whole file
    )
    @given(target.cases)
    def put_in(case: Any) -> None:
        before(case)
        came[check(case)] += 1

    put_in.__qualname__ = put_in.__name__ = target.name.replace(
        " ", "_"
    )  # seeds a derandomised run
    (put_in if start is None else seed(start)(put_in))()
    return came
