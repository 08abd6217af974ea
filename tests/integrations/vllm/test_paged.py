"""Packed batches over an engine's blocks give what each request alone would."""

import centres
import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq import dispatch, msl
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.integrations.vllm.paged import (
    EnginePool,
    KernelTables,
    PagedLayer,
    Segment,
)
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.msl.compiler import why_not_simulate
from vllm_metal_tq.msl.simulate import simulate
from vllm_metal_tq.pages import PagePool
from vllm_metal_tq.sequences import Sequences

HEADS, KV_HEADS, HEAD_DIM, BLOCK, SCALE = 4, 2, 32, 16, 0.2
LAYOUT = PageLayout(TurboQuantConfig(4, 4, BLOCK), HEAD_DIM)
CENTRE = centres.random(KV_HEADS, HEAD_DIM)
SINKS = mx.array([0.5, -1.0, 2.0, 0.0])


def tokens(count, seed):
    """Queries, keys and values of a request's tokens, ``(1, heads, count, HEAD_DIM)`` each."""
    shapes = [(1, heads, count, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [mx.random.normal(s, key=mx.random.key(7 * seed + i)) for i, s in enumerate(shapes)]


class Engine:
    """An engine over one layer: it gives blocks in no order, and packs what requests add."""

    def __init__(self, **options):
        self.layer = PagedLayer(EnginePool(LAYOUT, KV_HEADS, 64), **options)
        self.free = np.random.default_rng(0).permutation(64).tolist()
        self.blocks, self.ends = {}, {}

    def step(self, tokens, counts, **options):
        """What requests get for as many of their next tokens each, in the order of ``counts``."""
        if not counts:
            return {}
        segments, parts, column = [], [], 0
        for request, count in counts.items():
            start = self.ends.get(request, 0)
            blocks = self.blocks.setdefault(request, [])
            while len(blocks) * BLOCK < start + count:
                blocks.append(self.free.pop())
            columns = slice(column, column + count)
            segments.append(Segment(request, columns, start, blocks, **options))
            parts.append([x[:, :, start : start + count] for x in tokens[request]])
            self.ends[request], column = start + count, column + count
        packed = [mx.concatenate(x, axis=2) for x in zip(*parts, strict=True)]
        out = self.layer.attend(*packed, segments, scale=SCALE, sinks=SINKS)
        for segment in segments:  # what kernels would be told
            batch, row = self.layer._places[segment.request]
            shown = batch.block_table[row, : len(segment.blocks)]
            assert shown.tolist() == segment.blocks
        return {s.request: out[:, :, s.columns] for s in segments}

    def reread(self, tokens, counts, few=None, **options):
        """What another layer gets from the same pages, for all new tokens or the last ``few``."""
        segments, parts, column = [], [], 0
        for request, count in counts.items():
            end, count = self.ends[request], min(count, few or count)
            columns = slice(column, column + count)
            segments.append(Segment(request, columns, end - count, self.blocks[request]))
            parts.append([x[:, :, end - count : end] for x in tokens[request]])
            column += count
        packed = [mx.concatenate(x, axis=2) for x in zip(*parts, strict=True)]
        out = self.layer.attend(*packed, segments, scale=SCALE, sinks=SINKS, stored=True)
        return {s.request: out[:, :, s.columns] for s in segments}


def alone(tokens, counts, centre=None, window=0):
    """What a request gets for its tokens in chunks of ``counts``, from a cache of its own."""
    sequences = Sequences(PagePool(LAYOUT, KV_HEADS), centre=centre, window=window)
    outputs, start = [], 0
    for count in counts:
        q, k, v = (x[:, :, start : start + count] for x in tokens)
        sequences.store(k, v)
        outputs.append(sequences.attend(q, k, v, scale=SCALE, mask="causal", sinks=SINKS))
        start += count
    return mx.concatenate(outputs, axis=2)


def close(x, y):
    return mx.abs(x - y).max().item() < 1e-5


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("centre", [None, CENTRE])
def test_requests_that_come_and_go_get_what_each_would_alone(centre, window):
    texts = {name: tokens(120, seed) for seed, name in enumerate("abc")}
    schedule = [
        {"a": 40},
        {"a": 1, "b": 70},
        {"a": 1, "b": 1},
        {"b": 1, "a": 1},
        {"a": 1, "b": 1, "c": 9},
        {"a": 1, "b": 1, "c": 1},
        {"c": 1, "a": 3, "b": 3},
        {"b": 1, "c": 4},
        {"a": 30, "c": 30},
        {"a": 1, "b": 1, "c": 1},
    ]
    engine, got = Engine(centre=centre, window=window), {}
    for counts in schedule:
        for request, output in engine.step(texts, counts).items():
            got.setdefault(request, []).append(output)
    for request, outputs in got.items():
        counts = [counts[request] for counts in schedule if request in counts]
        expected = alone(texts[request], counts, centre, window)
        assert close(mx.concatenate(outputs, axis=2), expected), request


READ_BY_OTHERS = [
    {"a": 40},
    {"a": 1, "b": 70},
    {"a": 1, "b": 1},
    {"b": 9, "a": 3},
    {"a": 1, "b": 1},
]


@pytest.mark.parametrize("window", [0, 20])
def test_layers_that_read_the_pages_of_another_get_the_same_and_write_nothing(window):
    texts = {name: tokens(120, seed) for seed, name in enumerate("ab")}
    engine, undisturbed = Engine(window=window), Engine(window=window)
    for counts in READ_BY_OTHERS:
        expected, own = undisturbed.step(texts, counts), engine.step(texts, counts)
        pages = mx.array(engine.layer.pool.pages)
        again = engine.reread(texts, counts)
        for request, output in expected.items():
            assert close(own[request], output)
            assert close(again[request], output)
        assert mx.array_equal(engine.layer.pool.pages, pages)


@pytest.mark.parametrize("window", [0, 20])
def test_of_a_long_chunk_they_may_read_for_the_last_token_alone(window):
    texts = {name: tokens(120, seed) for seed, name in enumerate("ab")}
    engine, patient = Engine(window=window), Engine(window=window)
    for counts in READ_BY_OTHERS:
        patient.step(texts, {name: count - 1 for name, count in counts.items() if count > 1})
        expected, own = patient.step(texts, dict.fromkeys(counts, 1)), engine.step(texts, counts)
        again = engine.reread(texts, counts, few=1)
        for request, output in expected.items():
            assert close(again[request], output)
            assert counts[request] > 1 or close(own[request], output)


def test_a_window_sees_what_a_short_text_would():
    # Tokens beyond the window change nothing, whatever they are.
    texts = {"a": tokens(60, 0)}
    texts["b"] = [mx.concatenate([10 * x[:, :, :20], x[:, :, 20:]], axis=2) for x in texts["a"]]
    engine = Engine(window=24)
    engine.step(texts, {"a": 59, "b": 59})
    last = engine.step(texts, {"a": 1, "b": 1})
    assert close(last["a"], last["b"])


def test_layers_share_the_tables_that_kernels_take():
    tables, first, second = KernelTables(), list(range(70)), [7, 8]
    pool = EnginePool(LAYOUT, HEADS, 70)
    made = tables.of([first, second], pool)
    assert tables.of([first, second], pool) is made
    assert made.shape == (2, 128)
    assert made[0, :70].tolist() == first
    assert made[1].tolist() == second + [0] * 126
    tables.begin()
    second += [9]
    longer = tables.of([first, second], pool)
    assert longer[0].tolist() == made[0].tolist()
    assert longer[1, :4].tolist() == [7, 8, 9, 0]
    assert (
        tables.of([list(first), second], pool) is not longer
    )  # another list may be of other blocks
    tables.begin()
    tables.begin()
    assert tables.of([first, second], pool) is not longer  # nobody asked for it in a whole pass
    with pytest.raises(ValueError, match="there is no block 70"):
        tables.of([[70]], pool)


@pytest.mark.skipif(not msl.can_simulate(), reason=str(why_not_simulate()))
@pytest.mark.parametrize("window", [0, 40])
def test_kernels_give_what_the_reference_gives(window, monkeypatch):
    texts = {name: tokens(80, seed) for seed, name in enumerate("ab")}
    schedule = [{"a": 60}, {"a": 1, "b": 30}, {"a": 1, "b": 1}, {"b": 1}, {"a": 3, "b": 3}]

    def outputs():
        engine = Engine(centre=CENTRE, window=window)
        return [mx.concatenate([*engine.step(texts, c).values()], axis=2) for c in schedule]

    expected, launched = outputs(), []

    def execute(launch):
        launched.append((launch.kernel, len(launch.inputs.get("lengths", []))))
        return simulate(launch)

    monkeypatch.setattr(dispatch, "executor", lambda layout: execute)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    for got, wanted in zip(outputs(), expected, strict=True):
        assert mx.abs(got - wanted).max().item() < 5e-3
    assert ("decode_fma", 2) in launched  # both requests in one launch


def test_blocks_before_the_window_may_be_taken_back():
    text = {"a": tokens(80, 0)}
    engine, other = Engine(window=24), Engine(window=24)
    for e in (engine, other):
        e.step(text, {"a": 60})
        e.step(text, {"a": 1})
    engine.blocks["a"] = [0, 0, *engine.blocks["a"][2:]]
    engine.layer.pool.pages[0] = 255  # NaN wherever it is read
    assert close(engine.step(text, {"a": 1})["a"], other.step(text, {"a": 1})["a"])


def exact(tokens, end):
    """Attention of the last of ``end`` tokens, nothing compressed."""
    q, k, v = (x[:, :, :end] for x in tokens)
    options = {"scale": SCALE, "sinks": SINKS}
    return mx.fast.scaled_dot_product_attention(q[:, :, -1:], k, v, **options)


def error(output, tokens, end):
    return mx.abs(output - exact(tokens, end)).mean().item()


def test_drafts_that_are_refused_leave_no_trace():
    text, other = tokens(60, 0), tokens(60, 1)
    drafts = [
        mx.concatenate([x[:, :, :41], y[:, :, 41:]], axis=2)
        for x, y in zip(text, other, strict=True)
    ]
    engine = Engine()
    engine.step({"a": text}, {"a": 40})
    engine.step({"a": drafts}, {"a": 5})
    engine.ends["a"] = 41  # the first was right
    straight = alone(text, [40, 1, 1])[:, :, -1:]
    after = engine.step({"a": text}, {"a": 1})["a"]
    # The tail has lost as many tokens as there were wrong drafts: they come from pages.
    assert mx.abs(after - straight).mean().item() < error(straight, text, 42) + 1e-3
    assert error(after, text, 42) < 0.05 < error(after, other, 42)


def test_a_prefix_in_shared_blocks_is_read_from_pages():
    text = tokens(60, 0)
    engine = Engine(centre=CENTRE)
    engine.step({"a": text}, {"a": 48})
    engine.blocks["b"], engine.ends["b"] = engine.blocks["a"][:2], 32
    hit = engine.step({"b": text}, {"b": 16})["b"]
    # What its own first blocks would hold: a cold start that has forgotten its tail.
    cold = Engine(centre=CENTRE)
    cold.step({"b": text}, {"b": 32})
    cold.layer.forget(["b"])
    assert close(hit, cold.step({"b": text}, {"b": 16})["b"])


def test_a_request_that_starts_anew_under_its_name_has_no_old_tail():
    old, new = tokens(50, 0), tokens(50, 1)
    engine, fresh = Engine(), Engine()
    engine.step({"a": old}, {"a": 40})
    engine.layer.forget(["a"])
    engine.ends["a"] = 0
    for e in (engine, fresh):
        e.step({"a": new}, {"a": 33})
    assert close(engine.step({"a": new}, {"a": 1})["a"], fresh.step({"a": new}, {"a": 1})["a"])


def test_one_of_a_batch_that_is_preempted_and_comes_back_starts_without_a_tail():
    texts = {"a": tokens(60, 0), "b": tokens(60, 1)}
    engine = Engine()
    engine.step(texts, {"a": 40, "b": 40})
    engine.step(texts, {"a": 1, "b": 1})
    engine.layer.forget(["b"])
    engine.ends["b"] = 0
    engine.step(texts, {"b": 41})
    got = engine.step(texts, {"a": 1, "b": 1})
    assert close(got["a"], alone(texts["a"], [40, 1, 1])[:, :, -1:])
    assert close(got["b"], alone(texts["b"], [41, 1])[:, :, -1:])


def test_tokens_whose_positions_are_no_indices_get_no_flags():
    keys, values = (x[None] for x in centres.typical(CENTRE, 40))
    text = {"a": [tokens(40, 0)[0], keys, values]}
    flags = []
    for by_index in (True, False):
        engine = Engine(centre=CENTRE)
        engine.step(text, {"a": 40}, by_index=by_index)
        scales = LAYOUT.split(np.array(engine.layer.pool.pages))[-1].view(np.float16)
        flags.append(np.signbit(scales[..., 0]).mean())
    assert flags[0] > 0.03  # of all slots, most of which are empty
    assert flags[1] == 0


def test_copied_blocks_hold_the_same_pages():
    engine = Engine()
    engine.step({"a": tokens(40, 0)}, {"a": 40})
    used, free = engine.blocks["a"][:2], engine.free[:2]
    engine.layer.pool.copy_blocks(zip(used, free, strict=True))
    pages = engine.layer.pool.pages
    assert mx.array_equal(pages[mx.array(used)], pages[mx.array(free)])
    assert pages[mx.array(used)].any()
