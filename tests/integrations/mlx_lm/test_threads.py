"""Threads and processes: caches of one's own are one's own, and a cache can change hands."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
import pytest
from models import build, greedy, llama, tokens

from vllm_metal_tq import TurboQuantConfig, load_prompt_cache, make_prompt_cache, save_prompt_cache
from vllm_metal_tq.integrations.mlx_lm import CachePools, TurboQuantKVCache, calibrate, hook

STEPS = 6


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def other():
    return build("qwen2", head_dim=64, hidden_size=256, num_hidden_layers=2)


def logits(model, cache, seed=0, prompt=40):
    """What a model says of a prompt and after each of some steps: ``(STEPS + 1, vocab)``."""
    ids = tokens(prompt + STEPS, seed)
    parts = [ids[:, :prompt], *mx.split(ids[:, prompt:], STEPS, axis=1)]
    return np.stack([np.array(model(part, cache=cache)[0, -1]) for part in parts])


def in_threads(*jobs):
    """What jobs return that begin together, each in a thread of its own."""
    together = threading.Barrier(len(jobs))

    def run(job):
        together.wait()
        try:
            return job()
        finally:
            if clear := getattr(mx, "clear_streams", None):  # as every thread that uses MLX should
                clear()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.mark.parametrize("count", [2, 5])
def test_threads_with_caches_of_their_own_get_what_they_would_get_alone(model, count):
    alone = [logits(model, make_prompt_cache(model), seed) for seed in range(count)]
    assert not np.allclose(alone[0], alone[1], atol=1e-3)  # another's would be noticed

    def job(seed):
        return lambda: [logits(model, make_prompt_cache(model), seed) for _ in range(4)]

    for expected, found in zip(alone, in_threads(*map(job, range(count))), strict=True):
        for again in found:
            np.testing.assert_array_equal(again, expected)


def test_the_first_use_may_be_in_several_threads_at_once():
    """Nothing that is made once, and kept, belongs to the thread that came first."""
    unlike = llama(head_dim=80)
    config = TurboQuantConfig(5, 3)

    def job():
        return logits(unlike, make_prompt_cache(unlike, config))

    first, second = in_threads(job, job)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, job())


@pytest.mark.parametrize("prompt", [3, 40, 300])
@pytest.mark.parametrize("make", [host.make_prompt_cache, make_prompt_cache])
def test_a_cache_goes_on_in_another_thread(model, make, prompt):
    """Though the thread that began has ended, and nothing of the cache was evaluated by hand."""
    expected, cache = make(model), make(model)
    for seed in range(3):
        (found,) = in_threads(lambda seed=seed: logits(model, cache, seed, prompt))
        np.testing.assert_array_equal(found, logits(model, expected, seed, prompt))


def test_a_cache_is_saved_in_another_thread(model, tmp_path):
    cache, file = make_prompt_cache(model), tmp_path / "a.safetensors"
    in_threads(lambda: greedy(model, cache, tokens(5)[0], 4))
    in_threads(lambda: save_prompt_cache(file, cache, model))
    (loaded,) = in_threads(lambda: load_prompt_cache(file, model))
    np.testing.assert_array_equal(logits(model, loaded, 3), logits(model, cache, 3))


def test_pools_serve_one_thread_after_another(model):
    pools = CachePools(model)
    expected = logits(model, make_prompt_cache(model), 1)
    for _ in range(3):
        (found,) = in_threads(lambda: logits(model, pools.make_prompt_cache(), 1))
        np.testing.assert_array_equal(found, expected)
    assert pools.used_blocks == 0


@pytest.mark.skipif(
    not hasattr(mx, "clear_streams"), reason="before 0.32, MLX's streams belonged to no thread"
)
def test_pages_that_a_thread_has_only_begun_are_refused_in_another(model):
    pools = CachePools(model)
    cache = pools.make_prompt_cache()
    begun = []
    in_threads(lambda: begun.append(model(tokens(40), cache=cache)))  # and not evaluated
    with pytest.raises(RuntimeError, match="There is no Stream"):
        logits(model, pools.make_prompt_cache())


class TestTwoModels:
    """In one process, with pools attached to each, of different widths."""

    @pytest.fixture
    def served(self, model, other):
        some = [
            CachePools(model, TurboQuantConfig.from_names("tq4"), calibration=measured(model)),
            CachePools(other, TurboQuantConfig.from_names("tq8")),
        ]
        for pools in some:
            pools.attach()
        yield some
        for pools in some:
            pools.detach()

    def test_do_not_mix_when_they_take_turns(self, model, other, served):
        alone = [logits(m, host.make_prompt_cache(m), 7) for m in (model, other)]
        caches = [host.make_prompt_cache(m) for m in (model, other)]
        ids = tokens(40 + STEPS, 7)
        found = [[], []]
        for part in [ids[:, :40], *mx.split(ids[:, 40:], STEPS, axis=1)]:
            for i, m in enumerate((model, other)):
                found[i].append(np.array(m(part, cache=caches[i])[0, -1]))
        for mine, expected in zip(found, alone, strict=True):
            np.testing.assert_array_equal(np.stack(mine), expected)

    def test_do_not_mix_in_two_threads(self, model, other, served):
        alone = [logits(m, host.make_prompt_cache(m), 7) for m in (model, other)]

        def job(m):
            return lambda: [logits(m, host.make_prompt_cache(m), 7) for _ in range(4)]

        for expected, found in zip(alone, in_threads(job(model), job(other)), strict=True):
            for again in found:
                np.testing.assert_array_equal(again, expected)

    def test_keep_their_own_widths_and_centres(self, model, other, served):
        for pools, m in zip(served, (model, other), strict=True):
            caches = host.make_prompt_cache(m)
            assert {c.pool for c in caches} == set(pools.pools)
        first, second = (host.make_prompt_cache(m)[0] for m in (model, other))
        assert (first.layout.config.k_width, second.layout.config.k_width) == (4, 8)
        assert not set(served[0].pools) & set(served[1].pools)


def measured(model):
    return calibrate(model, tokens(600, 9)[0].tolist())


class TestTheHook:
    """Rebinds names for the whole process: nothing that it does for one thread hurts another."""

    def test_is_installed_while_another_thread_generates(self, model):
        expected = logits(model, make_prompt_cache(model), 2)
        ended = threading.Event()

        def install():
            count = 0
            while not ended.is_set():
                CachePools(model)
                count += 1
            return count

        def generate():
            try:
                return [logits(model, make_prompt_cache(model), 2) for _ in range(5)]
            finally:
                ended.set()

        found, count = in_threads(generate, install)
        assert count > 1
        for again in found:
            np.testing.assert_array_equal(again, expected)

    def test_uninstalled_under_a_thread_it_ends_in_an_error_and_not_in_other_logits(self, model):
        expected = logits(model, make_prompt_cache(model), 2)
        ended = threading.Event()

        def toggle():
            while not ended.is_set():
                hook.uninstall()
                hook.install(model)

        def generate():
            found, refused = [], 0
            try:
                for _ in range(20):
                    try:
                        found.append(logits(model, make_prompt_cache(model), 2))
                    except RuntimeError as error:
                        assert "installs the hook" in str(error)  # noqa: PT017
                        refused += 1
            finally:
                ended.set()
            return found, refused

        (found, refused), _ = in_threads(generate, toggle)
        assert len(found) + refused == 20
        for again in found:
            np.testing.assert_array_equal(again, expected)
        hook.install(model)

    def test_one_thread_does_not_see_what_another_attends_to(self, model):
        """A calibration, and the look at a new model, would count it as their own."""
        cache = make_prompt_cache(model)
        with hook.watched() as seen:
            in_threads(lambda: logits(model, cache))
            assert seen == []
            logits(model, cache)
        assert len(seen) == (STEPS + 1) * len(cache)

    def test_attached_pools_stay_attached_while_mlx_lms_caches_are_made(self, model, monkeypatch):
        """Another thread's request would get a cache that is not compressed."""
        pools, make, seen = CachePools(model), host.make_prompt_cache, []

        def another_thread_asks(*args):
            (caches,) = in_threads(model.make_cache)
            seen.extend(type(cache) for cache in caches)
            return make(*args)

        pools.attach()
        monkeypatch.setattr(host, "make_prompt_cache", another_thread_asks)
        try:
            caches = hook.host_caches(model)
        finally:
            pools.detach()
        assert {type(cache) for cache in caches} == {host.KVCache}
        assert seen == [TurboQuantKVCache] * len(caches)


def in_process(seed):
    """What a new process gets."""
    model = llama()
    return logits(model, make_prompt_cache(model), seed)


@pytest.mark.slow
def test_spawned_processes_get_the_same(model):
    expected = [logits(model, make_prompt_cache(model), seed) for seed in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for found, mine in zip(pool.map(in_process, range(2)), expected, strict=True):
            np.testing.assert_allclose(found, mine, atol=1e-5)
