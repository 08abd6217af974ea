import copy

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import numpy as np
import pytest
from gpu import bound, where_the_host_looks
from models import PROMPT, greedy, llama, tokens
from rows import rows_of

from vllm_metal_tq import (
    TurboQuantConfig,
    TurboQuantKVCache,
    make_prompt_cache,
    rope,
)
from vllm_metal_tq.centre import Centre
from vllm_metal_tq.config import PRESETS
from vllm_metal_tq.integrations.mlx_lm import hook
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import PagePool
from vllm_metal_tq.tail import TAIL, Tail


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def centre():
    """Some centre of a layer of the model: right or not, results hold."""
    mu, m = (0.5 * mx.random.normal((2, 64), key=mx.random.key(i)) for i in (1, 2))
    t = mx.exp(0.3 * mx.random.normal((2, 32), key=mx.random.key(3)))
    return Centre(rope.probe(nn.RoPE(64), 64).pairs, mu, mx.concatenate([t, t], axis=1), m)


def table(cache):
    """The block table of a cache's only sequence."""
    (only,) = cache.sequences.tables
    return only


def logits(model, cache, chunks):
    return mx.concatenate([model(chunk, cache=cache) for chunk in chunks], axis=1)


def chunked(sequence, *lengths):
    ends = np.cumsum(lengths).tolist()
    return [sequence[:, a:b] for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("preset", PRESETS)
def test_mlx_lm_generates_with_every_preset(model, preset):
    cache = make_prompt_cache(model, TurboQuantConfig.from_names(preset))
    dense = host.make_prompt_cache(model)
    assert len(greedy(model, cache)) == len(greedy(model, dense)) == 12
    assert cache[0].offset == cache[0].size() == dense[0].offset
    assert not cache[0].empty()


def test_eight_bits_are_close_to_the_uncompressed_cache(model):
    sequence = tokens(60)
    chunks = chunked(sequence, 40, *[1] * 20)
    exact = logits(model, host.make_prompt_cache(model), chunks)
    ours = logits(model, make_prompt_cache(model, TurboQuantConfig(8, 8)), chunks)
    assert mx.array_equal(ours[:, :40], exact[:, :40])  # the first chunk sees no pages
    assert 0 < mx.abs(ours - exact).max().item() < 0.02


def test_fewer_bits_are_further_from_the_uncompressed_cache(model):
    chunks = chunked(tokens(60), 40, *[1] * 20)
    exact = logits(model, host.make_prompt_cache(model), chunks)
    errors = [
        mx.abs(logits(model, make_prompt_cache(model, TurboQuantConfig(b, b)), chunks) - exact)
        .mean()
        .item()
        for b in (8, 6, 5, 4, 3, 2)
    ]
    assert errors == sorted(errors)


def test_equal_chunks_give_equal_logits_whatever_the_blocks(model):
    chunks = chunked(tokens(60), 37, 20, 1, 1, 1)
    results = [
        logits(model, make_prompt_cache(model, TurboQuantConfig(4, 3, block_size)), chunks)
        for block_size in (16, 32)
    ]
    assert mx.array_equal(*results)


def windowed(model, raw_window, centre=None):
    cache = make_prompt_cache(model, TurboQuantConfig(3, 3))
    for layer in cache:
        layer.sequences.raw_window, layer.sequences.centre = raw_window, centre
    return cache


@pytest.mark.parametrize("centred", [False, True])
def test_a_raw_window_makes_a_chunk_see_what_single_tokens_would(model, centre, centred):
    sequence = tokens(90)
    centre = centre if centred else None
    single = logits(model, windowed(model, None, centre), chunked(sequence, *[1] * 90))
    at_once = logits(model, windowed(model, TAIL, centre), chunked(sequence, 50, 40))
    assert mx.abs(at_once - single).max().item() < bound(1e-4, 0.05)
    plain = logits(model, windowed(model, None, centre), chunked(sequence, 50, 40))
    assert mx.abs(plain - single).max().item() > 1e-2


def test_a_raw_window_of_one_is_decoding_without_a_tail(model):
    sequence = tokens(60)
    at_once = logits(model, windowed(model, 1), chunked(sequence, 35, 25))
    cache, single = windowed(model, None), []
    for i in range(60):
        single.append(model(sequence[:, i : i + 1], cache=cache))
        for layer in cache:
            layer.sequences.tail = Tail()
    assert mx.abs(at_once - mx.concatenate(single, axis=1)).max().item() < bound(1e-4, 0.05)


def test_a_few_tokens_at_once_see_the_tail_and_nothing_after_themselves(model):
    # Eight bits: what differs is only which tokens are read from the tail.
    sequence, config = tokens(80), TurboQuantConfig(8, 8)
    single = logits(model, make_prompt_cache(model, config), chunked(sequence, 48, *[1] * 32))
    few = logits(model, make_prompt_cache(model, config), chunked(sequence, 48, 8, 8, 3, 5, 8))
    assert mx.abs(few - single).max().item() < 0.02


def test_a_long_prompt_in_steps_equals_the_same_chunks(model):
    prompt = tokens(70)
    stepped = make_prompt_cache(model)
    greedy(model, stepped, prompt[0], count=1, prefill_step_size=32)
    by_hand = make_prompt_cache(model)
    logits(model, by_hand, chunked(prompt, 32, 32, 5, 1))
    for a, b in zip(stepped, by_hand, strict=True):
        assert np.array_equal(rows_of(table(a), 70), rows_of(table(b), 70))


def test_trimming_goes_back_to_the_earlier_state(model):
    prompt, more = tokens(PROMPT), tokens(10, seed=1)
    cache = make_prompt_cache(model)
    model(prompt, cache=cache)
    earlier = copy.deepcopy(cache)
    for layer in earlier:
        layer.sequences.tail.lengths = [TAIL - 10]  # slots that the ten tokens take
    expected = model(tokens(5, seed=2), cache=earlier)
    model(more, cache=cache)
    assert host.can_trim_prompt_cache(cache)
    assert host.trim_prompt_cache(cache, 10) == 10
    assert cache[0].offset == cache[0].size() == PROMPT
    assert mx.array_equal(model(tokens(5, seed=2), cache=cache), expected)


def test_trimming_more_than_there_is_empties_the_cache(model):
    cache = make_prompt_cache(model)
    model(tokens(20), cache=cache)
    assert cache[0].trim(-5) == 0
    assert cache[0].trim(1000) == 20
    assert cache[0].empty()


def test_a_copy_is_independent(model):
    cache = make_prompt_cache(model)
    model(tokens(20), cache=cache)
    other = copy.deepcopy(cache)
    before = rows_of(table(other[0]), 20)
    model(tokens(20, seed=5), cache=cache)
    assert other[0].offset == 20
    assert other[0].sequences.tail.lengths == [20]
    assert np.array_equal(rows_of(table(other[0]), 20), before)


def test_decoding_does_not_allocate_an_uncompressed_cache():
    model = llama(num_hidden_layers=24)
    cache = make_prompt_cache(model)
    for seed in range(4):
        model(tokens(500, seed), cache=cache)
        mx.eval([c.state for c in cache])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(tokens(1), cache=cache))
    # One layer in float32 and its working set.
    assert mx.get_peak_memory() - before < 0.5 * sum(c.pool.nbytes_bf16 for c in cache)


def test_without_the_hook_attention_says_so():
    model = llama()
    cache = make_prompt_cache(model)
    hook.uninstall()
    with pytest.raises(RuntimeError, match="make it with make_prompt_cache"):
        model(tokens(5), cache=cache)


def test_the_state_of_another_cache_can_be_taken_over(model):
    cache, other = make_prompt_cache(model), make_prompt_cache(model, TurboQuantConfig(8, 3, 32))
    model(tokens(20), cache=cache)
    for a, b in zip(other, cache, strict=True):
        a.state = b.state
    assert greedy(model, other) == greedy(model, cache)


class TestMaxKvSize:
    def test_old_blocks_are_dropped_and_the_first_stays(self, model):
        cache = make_prompt_cache(model, max_kv_size=48)
        model(tokens(48), cache=cache)
        first = rows_of(table(cache[0]), 16)
        for i in range(40):
            model(tokens(1, seed=i), cache=cache)
            assert cache[0].size() <= 48
        assert cache[0].offset == 88
        assert np.array_equal(rows_of(table(cache[0]), 16), first)
        assert not cache[0].is_trimmable()

    def test_a_long_prompt_leaves_no_more_than_the_limit_allocated(self, model):
        cache = make_prompt_cache(model, max_kv_size=64)
        greedy(model, cache, tokens(3000)[0], count=3)
        assert cache[0].size() <= 64
        assert cache[0].pool.num_blocks * 16 <= 64 + 256

    @pytest.mark.parametrize("centred", [False, True])
    def test_the_tail_follows_what_is_dropped(self, model, centre, centred):
        # With eight bits it does not show whether a token is read from pages or from the tail,
        # unless it is another token.
        chunks = chunked(tokens(150), 60, 1, 9, 1, 7, *[1] * 40, 25, 7)

        def run(with_tail):
            cache = make_prompt_cache(model, TurboQuantConfig(8, 8), max_kv_size=48)
            for layer in cache:
                layer.sequences.centre = centre if centred else None
            out = []
            for chunk in chunks:
                out.append(model(chunk, cache=cache))
                for layer in cache:
                    if not with_tail:
                        layer.sequences.tail = Tail()
            return mx.concatenate(out, axis=1)

        assert mx.abs(run(True) - run(False)).max().item() < 0.03

    def test_below_the_limit_nothing_changes(self, model):
        assert greedy(model, make_prompt_cache(model, max_kv_size=64)) == greedy(
            model, make_prompt_cache(model)
        )

    def test_a_chunk_after_dropping_sees_what_is_left(self, model):
        chunks = chunked(tokens(70), 48, 22)
        cache = make_prompt_cache(model, TurboQuantConfig(8, 8), max_kv_size=48)
        out = logits(model, cache, chunks)
        assert cache[0].size() == 16 + 22
        assert out.shape == (1, 70, 97)
        assert mx.isfinite(out).all()

    @pytest.mark.parametrize("max_kv_size", [-1, 0, 31])
    def test_a_limit_below_two_blocks_is_refused(self, model, max_kv_size):
        with pytest.raises(ValueError, match=f"{max_kv_size} is too few: at least 32"):
            make_prompt_cache(model, max_kv_size=max_kv_size)


@pytest.mark.parametrize("centred", [False, True])
def test_sequences_that_step_together_are_each_attended_as_alone(model, centre, centred):
    centre = centre if centred else None
    batch = mx.concatenate([tokens(60, seed) for seed in (1, 2, 3)])
    parts = chunked(batch, 40, 1, 7, 1, 11)
    together = logits(model, windowed(model, None, centre), parts)
    for i in range(3):
        alone = logits(model, windowed(model, None, centre), [part[i : i + 1] for part in parts])
        assert mx.abs(together[i] - alone[0]).max().item() < 1e-4


class TestBadInput:
    @where_the_host_looks
    def test_nan_is_refused_and_nothing_is_stored(self):
        cache = TurboQuantKVCache(PagePool(PageLayout(TurboQuantConfig(4, 4), 64), 2))
        good = mx.random.normal((1, 2, 20, 64), key=mx.random.key(0))
        cache.update_and_fetch(good, good)
        before = rows_of(table(cache), 20)
        bad = mx.array(good)
        bad[0, 1, 3, 5] = float("nan")
        with pytest.raises(ValueError, match="values hold NaN"):
            cache.update_and_fetch(good, bad)
        assert (cache.offset, cache.size()) == (20, 20)
        assert np.array_equal(rows_of(table(cache), 20), before)

    def test_another_batch_than_the_first_is_refused(self, model):
        cache = make_prompt_cache(model)
        model(mx.zeros((2, 5), mx.int32), cache=cache)
        with pytest.raises(ValueError, match="this cache holds 2 sequences of 2 KV heads"):
            model(mx.zeros((3, 1), mx.int32), cache=cache)

    def test_a_head_dim_that_cannot_be_rotated_is_refused_before_anything_runs(self):
        with pytest.raises(ValueError, match="head_dim 4 cannot be rotated"):
            make_prompt_cache(llama(head_dim=4))
