import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
import pytest
from models import PROMPT, greedy, llama, tokens
from rows import rows_of

from vllm_metal_tq import (
    TurboQuantConfig,
    TurboQuantKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from vllm_metal_tq.integrations.mlx_lm import calibrate, report
from vllm_metal_tq.tail import Tail


@pytest.fixture(scope="module")
def model():
    return llama()


def test_bytes_reported_are_bytes_allocated(model):
    cache = make_prompt_cache(model, TurboQuantConfig.from_names("tq4"))
    assert report(cache).kv_bytes == 0
    model(tokens(300), cache=cache)
    dense = host.make_prompt_cache(model)
    model(tokens(300), cache=dense)
    held = report(cache)
    pages, tails = 3 * 2 * 512 * 68, 3 * 2 * 32 * 2 * 64 * 4  # float32 here
    assert sum(c.pool.pages.nbytes for c in cache) == pages
    assert held.kv_bytes == pages + tails
    # mlx_lm's cache has room for as many tokens, in float32 here.
    assert held.kv_bytes_bf16 == sum(c.nbytes for c in dense) / 2
    assert held.ratio == held.kv_bytes_bf16 / held.kv_bytes
    assert (held.layers, held.layers_compressed) == (3, 3)


def test_layers_may_have_widths_of_their_own(model):
    config = TurboQuantConfig.from_names("tq4", block_size=32, layers="0=tq8,2=q3_0/q2_0")
    cache = make_prompt_cache(model, config)
    widths = [(8, 6, 32), (4, 4, 32), (3, 2, 32)]
    assert [c.config for c in cache] == [TurboQuantConfig(*w) for w in widths]
    assert len(greedy(model, cache)) == 12
    with pytest.raises(ValueError, match="there is no layer 3: the model has 3"):
        make_prompt_cache(model, TurboQuantConfig.from_names(layers="2-3=tq8"))


def test_layers_that_are_not_compressed_count_as_they_are():
    pattern = ["sliding_attention", "full_attention"] * 2
    model = llama(num_hidden_layers=4, layer_types=pattern, sliding_window=8)
    cache = make_prompt_cache(model)
    model(tokens(20), cache=cache)
    held = report(cache)
    dense = sum(c.nbytes for c in cache[::2])
    assert (held.layers, held.layers_compressed) == (4, 2)
    assert held.kv_bytes == dense + sum(c.nbytes for c in cache[1::2])
    assert held.kv_bytes_bf16 == dense + sum(c.nbytes_bf16 for c in cache[1::2])


class TestSavedCaches:
    @pytest.fixture
    def saved(self, model, tmp_path):
        cache = make_prompt_cache(model, TurboQuantConfig(4, 3, 32))
        model(tokens(PROMPT), cache=cache)
        file = tmp_path / "prompt.safetensors"
        save_prompt_cache(file, cache, {"note": "test"})
        return file, cache

    def test_reloaded_equals_never_saved(self, model, saved):
        file, cache = saved
        loaded = load_prompt_cache(file, model)
        assert [c.config for c in loaded] == [TurboQuantConfig(4, 3, 32)] * 3
        more = tokens(30, seed=3)[0]
        assert greedy(model, loaded, more, 20) == greedy(model, cache, more, 20)
        for a, b in zip(loaded, cache, strict=True):
            assert np.array_equal(rows_of(a.table, b.size()), rows_of(b.table, b.size()))

    def test_metadata_comes_back(self, model, saved):
        assert load_prompt_cache(saved[0], model, return_metadata=True)[1] == {"note": "test"}

    def test_a_limited_cache_with_uncompressed_layers_survives(self, tmp_path):
        pattern = ["sliding_attention", "full_attention"] * 2
        model = llama(num_hidden_layers=4, layer_types=pattern, sliding_window=8)
        cache = make_prompt_cache(model, max_kv_size=64)
        model(tokens(20), cache=cache)
        save_prompt_cache(tmp_path / "c.safetensors", cache)
        loaded = load_prompt_cache(tmp_path / "c.safetensors", model)
        assert greedy(model, loaded) == greedy(model, cache)

    def test_a_name_without_the_suffix_is_refused(self, model, tmp_path):
        with pytest.raises(ValueError, match=r"must end in .safetensors"):
            save_prompt_cache(tmp_path / "prompt.cache", make_prompt_cache(model))

    def test_scales_that_are_not_finite_are_refused(self, saved):
        pages, *rest = saved[1][0].state
        with pytest.raises(ValueError, match="scales that are not finite"):
            TurboQuantKVCache.from_state((mx.full(pages.shape, 255, mx.uint8), *rest))

    def test_mlx_lms_own_loader_reads_it(self, model, saved):
        file, cache = saved
        loaded = host.load_prompt_cache(str(file))
        assert np.array_equal(rows_of(loaded[1].table, PROMPT), rows_of(cache[1].table, PROMPT))

    def test_a_cache_that_dropped_tokens_survives(self, model, tmp_path):
        cache = make_prompt_cache(model, max_kv_size=48)
        for i in range(3):
            model(tokens(30, seed=i), cache=cache)
        save_prompt_cache(tmp_path / "c.safetensors", cache)
        loaded = load_prompt_cache(tmp_path / "c.safetensors", model)
        assert loaded[0].offset == 90
        assert loaded[0].max_kv_size == 48
        assert greedy(model, loaded) == greedy(model, cache)

    def test_an_empty_cache_survives(self, model, tmp_path):
        save_prompt_cache(tmp_path / "c.safetensors", make_prompt_cache(model))
        loaded = load_prompt_cache(tmp_path / "c.safetensors", model)
        assert greedy(model, loaded) == greedy(model, make_prompt_cache(model))

    def test_a_missing_file_is_named(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors'?: no such file"):
            load_prompt_cache(tmp_path / "nowhere.safetensors", model)

    @pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9999])
    def test_a_file_cut_short_is_refused(self, model, saved, share):
        file, _ = saved
        data = file.read_bytes()
        file.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match="is damaged or foreign"):
            load_prompt_cache(file, model)

    @pytest.mark.parametrize("content", [b"not a cache", b"\0" * 4096])
    def test_a_file_of_another_kind_is_refused(self, model, tmp_path, content):
        file = tmp_path / "x.safetensors"
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or foreign"):
            load_prompt_cache(file, model)

    def test_safetensors_without_a_cache_are_refused(self, model, tmp_path):
        file = tmp_path / "weights.safetensors"
        mx.save_safetensors(str(file), {"weight": mx.zeros((3,))})
        with pytest.raises(ValueError, match="is damaged or foreign"):
            load_prompt_cache(file, model)

    def test_another_models_cache_is_refused(self, saved):
        file, _ = saved
        with pytest.raises(ValueError, match="was made by another model"):
            load_prompt_cache(file, llama(head_dim=128))
        with pytest.raises(ValueError, match="was made by another model"):
            load_prompt_cache(file, llama(num_hidden_layers=2))

    def test_an_uncompressed_cache_is_refused(self, model, tmp_path):
        cache = host.make_prompt_cache(model)
        model(tokens(5), cache=cache)
        host.save_prompt_cache(str(tmp_path / "dense.safetensors"), cache)
        with pytest.raises(ValueError, match="was made by another model"):
            load_prompt_cache(tmp_path / "dense.safetensors", model)

    @pytest.mark.parametrize(
        ("place", "number"),
        [
            *((0, 1), (1, 7), (3, 24), (4, 72), (5, 3), (8, 41), (8, -1)),
            *((9, 33), (9, 0), (10, 1), (10, 2), (-1, 99)),
        ],
    )
    def test_a_header_that_contradicts_its_pages_is_refused(self, model, saved, place, number):
        pages, header, *rest = saved[1][0].state
        header[place] = number
        with pytest.raises(ValueError, match=r"unknown|do not fit"):
            TurboQuantKVCache.from_state((pages, header, *rest))

    def test_a_calibrated_cache_carries_its_centres(self, model, tmp_path):
        measured = calibrate(model, tokens(100)[0].tolist())
        cache = make_prompt_cache(model, calibration=measured)
        model(tokens(PROMPT), cache=cache)
        save_prompt_cache(tmp_path / "c.safetensors", cache)
        loaded = load_prompt_cache(tmp_path / "c.safetensors", model)
        assert mx.array_equal(loaded[1].centre.mu, measured.centres[1].mu)
        assert greedy(model, loaded) == greedy(model, cache)
        pages, header, *rest = cache[0].state
        rest[-2] = -rest[-2]  # the smoothing
        with pytest.raises(ValueError, match="no centre of 2 KV heads"):
            TurboQuantKVCache.from_state((pages, header, *rest))

    def test_a_lost_tail_loses_nothing_stored(self, saved):
        (cache, *_), before = saved[1], saved[1][0].state
        cache.tail = Tail()
        pages, header, *rest = cache.state
        assert rest == []
        assert mx.array_equal(pages, before[0])
        assert mx.array_equal(header[:9], before[1][:9])
        assert TurboQuantKVCache.from_state((pages, header)).size() == cache.size()
