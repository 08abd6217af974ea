from types import SimpleNamespace

import pytest

from vllm_metal_tq.bench import clock


def test_a_streams_times_are_its_first_and_the_median_after_a_warm_up(monkeypatch):
    # Of all but the first the median would be 5, and the mean of those after the warm-up 2.9.
    seconds = [20.0, *[9.0] * clock.WARM_UP, *[1.0] * 8, *[5.0] * (clock.REPEATS - 8)]
    marks = iter([sum(seconds[:i]) for i in range(len(seconds) + 1)])
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(marks)))
    assert clock.stream_times(range(clock.STREAMED)) == (20.0, 1.0)


@pytest.mark.parametrize("count", [0, clock.STREAMED - 1, clock.STREAMED + 1])
def test_a_stream_of_another_length_is_refused(count):
    with pytest.raises(ValueError, match=f"the stream has {count} items, not {clock.STREAMED}"):
        clock.stream_times(range(count))
