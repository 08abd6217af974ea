"""Caches of layers that share keys, that models read themselves, or that stand beside a state."""

import copy
from dataclasses import replace

import mlx.core as mx
import mlx_lm.models.cache as host
import pytest
from gpu import KERNELS
from kinds import NAMED
from mlx_lm.generate import BatchGenerator
from models import llama, tokens
from trained import trained

from vllm_metal_tq import (
    TurboQuantConfig,
    dispatch,
    load_prompt_cache,
    make_prompt_cache,
    msl,
    save_prompt_cache,
)
from vllm_metal_tq.evaluate import as_decoding
from vllm_metal_tq.integrations.mlx_lm import CachePools, calibrate, pools, report
from vllm_metal_tq.integrations.mlx_lm.fetched import FetchedKVCache, SharedKVCache, owner
from vllm_metal_tq.integrations.mlx_lm.parts import all_compressed
from vllm_metal_tq.integrations.mlx_lm.probe import Reader
from vllm_metal_tq.msl.compiler import why_not_simulate
from vllm_metal_tq.msl.simulate import simulate
from vllm_metal_tq.pages import OutOfBlocks

SHARED = "gemma3n", "gemma4_text with shared keys", "afm7"
FETCHED = "gemma2", "plamo2"
NARROW = "deepseek_v2", "mimo_v2_flash"
BESIDE = "falcon_h1", "baichuan_m1"
EVERY = SHARED + FETCHED + NARROW + BESIDE
LESS = {"num_hidden_layers": 1}
TQ4 = TurboQuantConfig(4, 4)
ROUNDING = 1e-3  # of logits


def model_of(name):
    kind = NAMED[name]
    pytest.importorskip(f"mlx_lm.models.{kind.model_type}")
    if not kind.is_here:
        pytest.skip(f"this mlx_lm has other caches for {name}")
    return trained(kind)


@pytest.fixture(scope="module")
def model(request):
    return model_of(request.param)


def each(*names):
    return pytest.mark.parametrize("model", names, ids=str, indirect=True)


def filled(model, config=TQ4):
    cache = make_prompt_cache(model, config)
    for chunk in (tokens(70), tokens(5, seed=1)):
        model(chunk, cache=cache)
    return cache


def following(model, cache):
    """Logits of a few steps after what a cache holds."""
    chunks = [tokens(1, seed=2), tokens(12, seed=3), tokens(3, seed=4), tokens(1, seed=5)]
    return mx.concatenate([model(chunk, cache=cache)[0] for chunk in chunks])


class TestEvery:
    @each(*EVERY)
    def test_it_is_saved_and_loaded(self, model, tmp_path):
        cache, file = filled(model), tmp_path / "prompt.safetensors"
        save_prompt_cache(file, cache, model)
        again = load_prompt_cache(file, model)
        assert list(map(type, again)) == list(map(type, cache))
        assert mx.array_equal(following(model, again), following(model, cache))

    @each(*EVERY)
    def test_mlx_lm_saves_and_loads_it(self, model, tmp_path):
        cache, file = filled(model), str(tmp_path / "prompt.safetensors")
        host.save_prompt_cache(file, cache)
        again = host.load_prompt_cache(file)
        assert list(map(type, again)) == list(map(type, cache))
        assert mx.array_equal(following(model, again), following(model, cache))

    @each(*EVERY)
    def test_what_follows_a_fork_is_what_follows_the_original(self, model):
        cache = filled(model)
        fork = copy.deepcopy(cache)
        assert mx.array_equal(following(model, fork), following(model, cache))

    @each(*EVERY)
    def test_bytes_reported_are_bytes_allocated(self, model):
        cache, dense = filled(model), host.make_prompt_cache(model)
        for chunk in (tokens(70), tokens(5, seed=1)):
            model(chunk, cache=dense)
        held, ours = report(cache), all_compressed(cache)
        others = sum(c.nbytes for c in cache) - sum(c.nbytes for c in ours)
        stored = sum(c.pool.pages.nbytes + c.sequences.tail.nbytes for c in ours)
        assert held.kv_bytes == others + stored
        assert held.layers_compressed == len(ours)
        if not any(c.sequences.window for c in ours):  # mlx_lm's rings begin smaller than ours
            # mlx_lm's have room for as many tokens, in float32 here.
            theirs = sum(c.nbytes for c in dense) - others
            assert held.kv_bytes_bf16 == others + theirs / 2

    @each(*EVERY)
    def test_a_budget_is_kept_and_nothing_is_stored_beyond_it(self, model):
        block = CachePools(model, TQ4).block_bytes
        limited = CachePools(model, TQ4, max_bytes=5 * block)
        cache = limited.make_prompt_cache()
        model(tokens(80), cache=cache)
        growing = [c for c in all_compressed(cache) if not c.sequences.window]
        assert sum(c.pool.num_used * c.pool.block_bytes for c in growing) == 5 * block
        with pytest.raises(OutOfBlocks, match="the key-value cache is full"):
            model(tokens(1), cache=cache)
        assert {c.size() for c in growing} == {80}

    @each("afm7", "gemma2", "deepseek_v2")  # the others' windows and states cannot go back
    def test_tokens_that_are_trimmed_leave_no_trace(self, model):
        cache = filled(model)
        expected = following(model, copy.deepcopy(cache))
        model(tokens(4, seed=9), cache=cache)
        assert [c.trim(4) for c in cache] == [4] * len(cache)
        assert mx.array_equal(following(model, cache), expected)

    @each(*SHARED, *FETCHED, *NARROW, *BESIDE)
    def test_calibrated_layers_continue_as_well(self, model):
        calibration = calibrate(model, tokens(200)[0].tolist())
        dense = host.make_prompt_cache(model)
        cache = make_prompt_cache(model, TurboQuantConfig(8, 8), calibration=calibration)
        for chunk in (tokens(70), tokens(5, seed=1)):
            model(chunk, cache=dense)
            model(chunk, cache=cache)
        ours, theirs = following(model, cache), following(model, dense)
        assert mx.abs(ours - theirs).max() < 0.1 * mx.std(theirs)


def generated(model, prompts):
    """Greedy tokens of prompts that mlx_lm generates together."""
    generator = BatchGenerator(model, completion_batch_size=3, prefill_batch_size=2)
    uids = generator.insert(prompts, [12] * len(prompts))
    found = {uid: [] for uid in uids}
    while any(len(some) < 12 for some in found.values()):
        for response in generator.next()[1]:
            found[response.uid].append(response.token)
    return list(found.values())


class TestBatches:
    @each(*SHARED[:2], *NARROW[:1], *BESIDE[:1])
    def test_a_batch_generates_what_each_prompt_does_alone(self, model):
        prompts = [tokens(n, seed=n)[0].tolist() for n in (40, 17, 64, 5)]
        attached = CachePools(model, TurboQuantConfig(8, 8))
        attached.attach()
        try:
            together = generated(model, prompts)
            assert together == [generated(model, [prompt])[0] for prompt in prompts]
            assert attached.used_blocks == 0
        finally:
            attached.detach()

    @each("gemma2")
    def test_a_model_s_own_attention_cannot_be_batched(self, model):
        assert not any(hasattr(cache, "merge") for cache in make_prompt_cache(model))
        attached = CachePools(model, TQ4)
        attached.attach()
        try:
            with pytest.raises(ValueError, match="does not yet support batching"):
                generated(model, [[1, 2, 3], [4]])
        finally:
            attached.detach()


@pytest.fixture
def as_if(monkeypatch):
    """Gives layers that nobody else reads the cache of such as are read otherwise."""

    def replace(cls):
        monkeypatch.setitem(pools.CLASSES, Reader.ITSELF, cls)

    return replace


class TestShared:
    @pytest.mark.parametrize("cls", [SharedKVCache, FetchedKVCache])
    @pytest.mark.parametrize("calibrated", [False, True])
    def test_what_is_read_is_what_a_plain_cache_reads(self, cls, calibrated, as_if):
        model = llama()
        calibration = calibrate(model, tokens(200)[0].tolist()) if calibrated else None

        def logits():
            cache = make_prompt_cache(model, TQ4, calibration=calibration)
            for chunk in (tokens(70), tokens(5, seed=1)):
                model(chunk, cache=cache)
            return type(cache[0]), following(model, cache)

        _, plain = logits()
        as_if(cls)
        kind, ours = logits()
        assert kind is cls
        assert mx.abs(ours - plain).max() < ROUNDING

    @pytest.mark.parametrize("cls", [SharedKVCache, FetchedKVCache])
    def test_dropped_tokens_are_dropped_for_every_reader(self, cls, as_if):
        model = llama(attention_bias=True)
        for layer in model.layers:  # means, which turn with the position
            shape = layer.self_attn.k_proj.bias.shape
            layer.self_attn.k_proj.bias = 3 * mx.random.normal(shape, key=mx.random.key(1))

        def logits():
            cache = make_prompt_cache(model, TQ4, max_kv_size=80)
            for chunk in (tokens(70), tokens(20, seed=1)):
                model(chunk, cache=cache)
            return following(model, cache)

        plain = logits()
        as_if(cls)
        assert mx.abs(logits() - plain).max() < ROUNDING

    def test_keys_that_are_read_by_other_code_show_nan_and_not_a_part_of_the_context(self, as_if):
        as_if(SharedKVCache)
        cache = make_prompt_cache(llama(), TQ4)[0]
        keys, values = (mx.random.normal((1, 2, 40, 64)) for _ in range(2))
        for size in (40, 1):
            handed_out = cache.update_and_fetch(keys[:, :, :size], values[:, :, :size])
        assert [x.shape for x in handed_out] == [(1, 2, 41, 64)] * 2
        assert all(mx.isnan(x).all() for x in handed_out)
        assert cache.keys_and_values() == handed_out

    def test_only_the_newest_stand_ins_lead_to_a_cache_and_not_beyond_its_life(self, as_if):
        as_if(SharedKVCache)
        cache = make_prompt_cache(llama(), TQ4)[0]
        new = mx.random.normal((1, 2, 1, 64))
        first = cache.update_and_fetch(new, new)
        assert owner(*first) is cache
        second = cache.update_and_fetch(new, new)
        assert owner(*first) is None
        assert owner(*second) is cache
        assert owner(second[1], second[0]) is None
        fork = copy.deepcopy(cache)
        with pytest.raises(RuntimeError, match="no keys were stored since"):
            fork.keys_and_values()
        del cache
        assert owner(*second) is None

    @pytest.mark.skipif(KERNELS, reason="MLX rounds what it allocates on a GPU")
    def test_what_was_handed_out_keeps_no_tokens_in_memory(self, as_if):
        as_if(SharedKVCache)
        cache = make_prompt_cache(llama(), TQ4)[0]
        many, one = (mx.random.normal((1, 2, n, 64)) for n in (10_000, 1))
        mx.eval(many, one)
        cache.update_and_fetch(many, many)
        before = mx.get_active_memory()
        del many
        handed_out = cache.update_and_fetch(one, one)
        mx.eval(handed_out, cache.state)
        assert mx.get_active_memory() < before - 10_000 * 2 * 64 * 4 + 2**20


class TestFetched:
    def test_soft_caps_bite(self):
        # Or the matrix would not notice one that is left out.
        def logits(cap):
            model = model_of("gemma2")
            for layer in model.layers:
                layer.self_attn.attn_logit_softcapping = cap
            return following(model, filled(model))

        capped, loose = logits(5.0), logits(1e4)
        assert mx.abs(capped - loose).max() > 0.1 * mx.std(loose)

    def test_all_keys_are_handed_out_with_recent_ones_as_they_came(self, as_if):
        as_if(FetchedKVCache)
        cache = make_prompt_cache(llama(), TurboQuantConfig(8, 8))[0]
        keys, values = (mx.random.normal((1, 2, 101, 64), key=mx.random.key(i)) for i in (0, 1))
        cache.update_and_fetch(keys[:, :, :100], values[:, :, :100])
        for new, out in zip(
            (keys, values),
            cache.update_and_fetch(keys[:, :, 100:], values[:, :, 100:]),
            strict=True,
        ):
            assert mx.array_equal(out[:, :, -32:], new[:, :, -32:])
            error = mx.linalg.norm(out - new) / mx.linalg.norm(new)
            assert 1e-4 < error < 0.02

    def test_sequences_of_different_lengths_are_refused(self, as_if):
        as_if(FetchedKVCache)
        cache = make_prompt_cache(llama(), TQ4)[0]
        new = mx.random.normal((2, 2, 40, 64))
        cache.update_and_fetch(new, new)
        cache.sequences.offsets[0] -= 1
        cache.sequences.tables[0].trim(1)
        with pytest.raises(ValueError, match=r"sequences of \[40, 41\] tokens cannot"):
            cache.update_and_fetch(new[:, :, :1], new[:, :, :1])

    def test_its_quality_cannot_be_measured(self):
        model = model_of("gemma2")
        with pytest.raises(ValueError, match="its quality cannot be measured"):
            as_decoding(make_prompt_cache(model, TQ4))


class TestNarrow:
    def test_values_of_another_size_are_refused(self):
        cache = make_prompt_cache(model_of("deepseek_v2"), TQ4)[0]
        keys, values = mx.zeros((1, 4, 3, 48)), mx.zeros((1, 4, 3, 32))
        cache.update_and_fetch(keys, values)
        with pytest.raises(ValueError, match="must have one shape"):
            cache.update_and_fetch(keys, values[..., :31])

    def test_the_report_compares_with_what_mlx_lm_keeps(self):
        model = model_of("deepseek_v2")
        cache = make_prompt_cache(model, TQ4)
        model(tokens(256), cache=cache)
        assert report(cache).kv_bytes_bf16 == 3 * 4 * 256 * (48 + 32) * 2


@pytest.mark.skipif(not msl.can_simulate(), reason=str(why_not_simulate()))
@pytest.mark.parametrize("name", ["gemma2", "afm7", "deepseek_v2"])
def test_kernels_and_the_reference_say_the_same(name, monkeypatch):
    fewer = {"num_layers": 2, "num_kv_reuse_layers": 1} if name == "afm7" else LESS
    if not NAMED[name].is_here:
        pytest.skip(f"this mlx_lm has other caches for {name}")
    model = trained(replace(NAMED[name], fields=NAMED[name].fields | fewer))
    calibration = calibrate(model, tokens(100, seed=1)[0].tolist())

    def logits():
        cache = make_prompt_cache(model, TurboQuantConfig(8, 6), calibration=calibration)
        found = [model(tokens(n, seed=n), cache=cache) for n in (60, 1, 2, 15, 1)]
        return mx.concatenate(found, axis=1)

    expected, launched = logits(), set()

    def execute(launch):
        launched.add(launch.kernel)
        return simulate(launch)

    monkeypatch.setattr(dispatch, "executor", lambda layout: execute)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    error = mx.abs(logits() - expected).max().item()
    assert error < 5e-3 * mx.abs(expected).max().item()
    decode = {"gather"} if name == "gemma2" else {"decode_fma", "merge"}
    assert {"encode"} | decode <= launched
