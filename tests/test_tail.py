import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq.tail import TAIL, Tail


def numbered(start, count):
    """Keys and values of one head and sequence: the token's number, and its negative."""
    keys = mx.arange(start, start + count, dtype=mx.float32)[None, None, :, None]
    return keys, -keys


def held(tail, num_tokens):
    if not tail.lengths[0]:
        return []
    keys, values = (np.array(x)[0, :, 0] for x in tail.ordered(0, num_tokens))
    assert np.array_equal(keys, -values)
    return keys.tolist()


@pytest.mark.parametrize("lengths", [(5,), (40, 1), (31, 1, 1), (32, 8, 8), (3, 100, 7), (64, 32)])
def test_it_holds_the_last_tokens_in_order(lengths):
    tail, end = Tail(), 0
    for length in lengths:
        tail.push(*numbered(end, length), [end])
        end += length
    assert held(tail, end) == list(range(max(end - TAIL, 0), end))
    slots = np.array(tail.arrays[0])[0, 0, :, 0]
    assert all(slots[i % TAIL] == i for i in range(max(end - TAIL, 0), end))


def test_trimmed_tokens_are_gone_and_the_others_stay():
    tail = Tail()
    tail.push(*numbered(0, 50), [0])
    tail.trim(10, [50])
    assert held(tail, 40) == list(range(18, 40))
    tail.push(*numbered(40, 3), [40])
    assert held(tail, 43) == list(range(18, 43))
    tail.trim(100, [43])
    assert held(tail, 0) == []


@pytest.mark.parametrize("start", [10, 40, 61])
@pytest.mark.parametrize("new", range(2, 9))
def test_of_a_few_tokens_all_can_be_trimmed_and_what_they_replaced_comes_back(start, new):
    """As drafts are: the ring holds what it would hold had the trimmed tokens never come."""
    for trims in ([n] for n in range(1, new + 1)), ([1, k] for k in range(1, new)):
        for counts in trims:
            tail, kept = Tail(), new - sum(counts)
            tail.push(*numbered(0, start), [0])
            tail.push(*numbered(start, new), [start])
            end = start + new
            for count in counts:
                tail.trim(count, [end])
                end -= count
            assert held(tail, end) == list(range(max(end - TAIL, 0), end))
            tail.push(*numbered(end, 1), [end])
            assert held(tail, end + 1) == list(range(max(end + 1 - TAIL, 0), end + 1))
            assert kept == end - start


def test_sequences_are_taken_and_joined_with_their_tails():
    tail, fresh = Tail(2), Tail(1)
    keys = mx.concatenate([numbered(0, 40)[0], numbered(100, 40)[0]])
    tail.push(keys, -keys, [0, 7])
    second = tail.take([1])
    joined = Tail.joined([fresh, second, tail])
    assert joined.lengths == [0, 32, 32, 32]
    assert joined.arrays[0].shape == (4, 1, TAIL, 1)
    for which, end, first in ((1, 47, 108), (2, 40, 8), (3, 47, 108)):
        shown = joined.ordered(which, end)[0][0, :, 0].tolist()
        assert shown == list(range(first, first + 32))
    assert Tail.joined([fresh, fresh]).arrays is None


@pytest.mark.parametrize(("dropped", "remaining"), [(16, 48), (32, 16), (48, 0), (96, 40)])
def test_indices_fall_when_older_tokens_are_dropped(dropped, remaining):
    tail, end = Tail(), 16 + dropped + remaining
    tail.push(*numbered(0, end), [0])
    tail.shift(0, dropped, remaining)
    assert held(tail, end - dropped) == list(range(end - min(remaining, TAIL), end))
    tail.push(*numbered(end, 1), [end - dropped])
    assert held(tail, end - dropped + 1)[-1] == end


def test_an_empty_one_takes_no_memory():
    tail = Tail()
    assert tail.nbytes == 0
    assert tail.ordered(0, 0) == ()
    tail.push(*numbered(0, 1), [0])
    assert tail.nbytes == 2 * TAIL * 4
