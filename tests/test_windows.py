"""A sequence that drops what lies behind its window attends as one that drops nothing."""

import centres
import mlx.core as mx
import pytest
from gpu import bound

from vllm_metal_tq import attention, dispatch, msl
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.msl.compiler import why_not_simulate
from vllm_metal_tq.msl.simulate import simulate
from vllm_metal_tq.pages import PagePool
from vllm_metal_tq.sequences import Sequences, most_tokens
from vllm_metal_tq.tail import FEW

HEADS, KV_HEADS, HEAD_DIM, BLOCK, SCALE = 4, 2, 32, 16, 0.2
CENTRE = centres.random(KV_HEADS, HEAD_DIM)
SINKS = mx.array([0.5, -1.0, 2.0, 0.0])
CHUNKS = 60, 1, 9, *[1] * 20, 3, 45, 8, 1, 1
WINDOWS = 5, 20, 48, 100


def made(**options):
    layout = PageLayout(TurboQuantConfig(4, 4, BLOCK), HEAD_DIM)
    return Sequences(PagePool(layout, KV_HEADS), **options)


def tokens(count, seed=0):
    """Queries, keys and values, ``(1, heads, count, HEAD_DIM)`` each."""
    shapes = [(1, heads, count, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [mx.random.normal(s, key=mx.random.key(7 * seed + i)) for i, s in enumerate(shapes)]


def run(sequences, chunks, mask=lambda length, stored: "causal", seed=0):
    """What each of the chunks gets, ``(1, HEADS, sum(chunks), HEAD_DIM)``."""
    text, outputs, start = tokens(sum(chunks), seed), [], 0
    if sequences.centre:  # keys around the mean are those that are stored without it
        text[1] = text[1] + sequences.centre.at(mx.arange(sum(chunks)) + sequences.offsets[0])
    for count in chunks:
        q, k, v = (x[:, :, start : start + count] for x in text)
        sequences.store(k, v)
        own = mask(count, start)
        outputs.append(sequences.attend(q, k, v, scale=SCALE, mask=own, sinks=SINKS))
        start += count
    return mx.concatenate(outputs, axis=2)


def difference(x, y):
    return mx.abs(x - y).max().item()


def whole(window, chunks=CHUNKS, **options):
    """With everything kept, and a mask that hides what is behind the window."""

    def mask(length, stored):
        return attention.window_mask(length, stored + length, window)

    return run(made(**options), chunks, mask)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("centre", [None, CENTRE], ids=["plain", "centred"])
def test_what_is_dropped_was_not_seen(window, centre):
    ring = made(window=window, centre=centre)
    assert difference(run(ring, CHUNKS), whole(window, centre=centre)) < bound(1e-5, 2e-3)
    assert ring.lengths[0] < ring.offsets[0]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_of_mlx_lm_s_own_cache_says_the_same(window):
    def last(length, stored):  # over as many tokens as a RotatingKVCache hands back
        return attention.window_mask(length, min(stored, window - 1) + length, window)

    ring = made(window=window)
    assert difference(run(ring, CHUNKS, last), whole(window)) < 1e-5


def test_an_additive_mask_serves_as_well():
    def last(length, stored):
        seen = attention.window_mask(length, min(stored, 47) + length, 48)
        return mx.where(seen, 0.0, -mx.inf)

    assert difference(run(made(window=48), CHUNKS, last), whole(48)) < 1e-5


@pytest.mark.parametrize("raw_window", [1, 32])
def test_the_window_holds_for_what_decoding_would_have_seen(raw_window):
    ring, kept = made(window=20, centre=CENTRE), made(centre=CENTRE)
    ring.raw_window = kept.raw_window = raw_window
    chunks = 50, 30, 7, 1

    def mask(length, stored):
        return attention.window_mask(length, stored + length, 20)

    assert difference(run(ring, chunks), run(kept, chunks, mask)) < 1e-5


@pytest.mark.parametrize("window", WINDOWS)
def test_memory_is_bounded(window):
    ring, bytes_held = made(window=window), []
    for step in range(40):
        _, k, v = tokens(64 if step % 2 else 1, step)
        ring.store(k, v)
        bytes_held.append(ring.pool.nbytes)
        assert ring.lengths[0] <= most_tokens(window, BLOCK, k.shape[2])
    assert ring.offsets[0] == 20 * 65
    assert bytes_held[-1] == max(bytes_held) == bytes_held[9]


def test_blocks_of_a_long_prompt_are_given_back():
    ring = made(window=48)
    for count in (4096, 1):
        _, k, v = tokens(count)
        ring.store(k, v)
    assert ring.pool.num_blocks * BLOCK <= 48 + FEW + BLOCK + 256  # which pools grow by


def test_a_fork_keeps_what_the_original_drops():
    first = made(window=48)
    run(first, (100,))
    fork = first.take([0])
    run(first, [1] * 80, seed=1)
    assert difference(run(fork, (9, 1), seed=2), run(self_at(100), (9, 1), seed=2)) == 0.0


def self_at(count):
    """A sequence at the same point that nobody forked from."""
    ring = made(window=48)
    run(ring, (count,))
    return ring


def test_drafts_that_are_refused_leave_nothing_behind():
    straight, drafted = self_at(100), self_at(100)
    for step in range(30):
        _, k, v = tokens(FEW, seed=50 + step)
        drafted.store(k, v)  # of which the model takes the first
        drafted.trim(FEW - 1)
        straight.store(k[:, :, :1], v[:, :, :1])
    outputs = [run(one, (1,), seed=3) for one in (straight, drafted)]
    assert difference(*outputs) < 1e-5


def test_more_than_the_window_leaves_cannot_be_trimmed():
    ring = self_at(100)
    run(ring, (1,))
    most = ring.trimmable
    assert FEW <= most < FEW + BLOCK + 1
    with pytest.raises(ValueError, match=f"{most + 1} tokens cannot be trimmed: at most the last"):
        ring.trim(most + 1)
    ring.trim(most)
    assert ring.lengths == [47]


@pytest.mark.skipif(not msl.can_simulate(), reason=str(why_not_simulate()))
def test_kernels_decode_from_what_is_left(monkeypatch):
    chunks, launched = (60, 1, 20, 1, 3, 1), []

    def execute(launch):
        launched.append(launch.kernel)
        return simulate(launch)

    monkeypatch.setattr(dispatch, "executor", lambda layout: execute)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    ring = made(window=48, centre=CENTRE)
    outputs = run(ring, chunks)
    assert ring.lengths[0] < ring.offsets[0]
    decoded = sum(kernel.startswith("decode") for kernel in launched)
    assert decoded == sum(count <= FEW for count in chunks)
    assert difference(outputs, whole(48, chunks, centre=CENTRE)) < 5e-3
