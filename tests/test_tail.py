import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq.tail import TAIL, Tail


def numbered(start, count):
    """Keys and values of one KV head whose elements are the token's number, and its negative."""
    keys = mx.arange(start, start + count, dtype=mx.float32)[None, :, None]
    return keys, -keys


def held(tail, num_tokens):
    if not tail.length:
        return []
    keys, values = (np.array(x)[0, :, 0] for x in tail.ordered(num_tokens))
    assert np.array_equal(keys, -values)
    return keys.tolist()


@pytest.mark.parametrize("lengths", [(5,), (40, 1), (31, 1, 1), (32, 8, 8), (3, 100, 7), (64, 32)])
def test_it_holds_the_last_tokens_in_order(lengths):
    tail, end = Tail(), 0
    for length in lengths:
        tail.push(*numbered(end, length), end)
        end += length
    assert held(tail, end) == list(range(max(end - TAIL, 0), end))
    slots = np.array(tail.arrays[0])[0, :, 0]
    assert all(slots[i % TAIL] == i for i in range(max(end - TAIL, 0), end))


def test_trimmed_tokens_are_gone_and_the_others_stay():
    tail = Tail()
    tail.push(*numbered(0, 50), 0)
    tail.trim(10)
    assert held(tail, 40) == list(range(18, 40))
    tail.push(*numbered(40, 3), 40)
    assert held(tail, 43) == list(range(18, 43))
    tail.trim(100)
    assert held(tail, 0) == []


@pytest.mark.parametrize(("dropped", "remaining"), [(16, 48), (32, 16), (48, 0), (96, 40)])
def test_indices_fall_when_older_tokens_are_dropped(dropped, remaining):
    tail, end = Tail(), 16 + dropped + remaining
    tail.push(*numbered(0, end), 0)
    tail.shift(dropped, remaining)
    assert held(tail, end - dropped) == list(range(end - min(remaining, TAIL), end))
    tail.push(*numbered(end, 1), end - dropped)
    assert held(tail, end - dropped + 1)[-1] == end


def test_an_empty_one_takes_no_memory():
    tail = Tail()
    assert tail.nbytes == 0
    assert tail.ordered(0) == ()
    tail.push(*numbered(0, 1), 0)
    assert tail.nbytes == 2 * TAIL * 4
