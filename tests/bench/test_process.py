import os

import processes
import pytest

from vllm_metal_tq.bench.process import (
    ProcessError,
    apart,
    background,
    outcome,
    rss_high_water,
)

MIB = processes.MIB


def exists(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_yields_and_returns_what_its_work_does():
    work = apart(processes.count, 3)
    assert [next(work) for _ in range(3)] == [0, 1, 2]
    assert outcome(work) == "done"


def test_openblas_can_come_before_mlx():
    assert "mlx.core" not in list(apart(processes.modules))


@pytest.mark.parametrize(
    ("raised", "seen", "message"),
    [
        (ValueError("too\nlong"), ValueError, "too\nlong"),
        (FileNotFoundError("no file"), ValueError, "no file"),
        (RuntimeError("out of memory\nat 3"), ProcessError, "RuntimeError: out of memory"),
    ],
)
def test_errors_come_after_what_was_yielded(raised, seen, message):
    work = apart(processes.refuse, raised)
    assert next(work) == 1
    with pytest.raises(seen) as error:
        next(work)
    assert str(error.value) == message
    assert "in refuse\n" in error.value.__notes__[0]  # for --debug


def test_a_killed_process_says_so_and_what_it_yielded_is_kept():
    work = apart(processes.be_killed)
    assert next(work) == 1
    with pytest.raises(ProcessError, match="as it does when memory runs out"):
        next(work)


def test_work_in_the_background_fails_with_one_line(capfd):
    with background(processes.fail) as process:
        process.join()
    assert process.exitcode == 1
    assert capfd.readouterr().err == "RuntimeError: no room\n"


def test_a_process_ends_with_whoever_waits_for_it():
    work = apart(processes.own_number)
    number = next(work)
    assert exists(number)
    work.close()
    assert not exists(number)
    with background(processes.sleep) as process:
        assert process.is_alive()
    assert not process.is_alive()


def test_the_high_water_mark_stays():
    before, held, after = apart(processes.forget, 64 * MIB)
    assert 60 * MIB < held - before < 80 * MIB
    assert after > held - MIB  # the system counts a few pages later


def test_the_high_water_mark_is_not_the_parents():
    held = bytearray(256 * MIB)
    held[::4096] = bytes(len(held[::4096]))
    assert rss_high_water() > 256 * MIB
    assert next(apart(processes.forget, 0)) < 128 * MIB
