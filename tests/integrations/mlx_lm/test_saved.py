"""Prompt caches in files: reloaded = never saved, and whatever is not whole or ours is refused."""

import hashlib
import json
import os
import re
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import pytest
from mlx.utils import tree_flatten, tree_map
from models import PROMPT, build, greedy, llama, tokens

from vllm_metal_tq import (
    TurboQuantConfig,
    TurboQuantKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from vllm_metal_tq.integrations.mlx_lm import CachePools, calibrate, saved

BLANK = b"0" * 64


@pytest.fixture(scope="module")
def model():
    return llama()


def sliding():
    pattern = ["sliding_attention", "full_attention"] * 2
    return llama(num_hidden_layers=4, layer_types=pattern, sliding_window=8)


def hybrid():
    """State-space layers, and one of plain attention."""
    return build(
        "qwen3_next",
        head_dim=64,
        num_hidden_layers=4,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=0,
        num_experts_per_tok=1,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[],
        moe_intermediate_size=32,
        partial_rotary_factor=0.25,
        full_attention_interval=4,
    )


def parallel():
    """State space and attention in every layer, whose caches are lists of two."""
    return build(
        "falcon_h1",
        num_hidden_layers=2,
        mamba_d_ssm=64,
        mamba_d_head=32,
        mamba_n_heads=2,
        mamba_d_state=16,
    )


def latent():
    """Layers whose cache is a plain one that cannot be compressed."""
    return build(
        "deepseek_v3",
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=None,
        n_shared_experts=None,
        num_key_value_heads=4,
        first_k_dense_replace=3,
        moe_intermediate_size=32,
    )


def state_of(cache):
    """All that a cache holds of what it has seen, as (name, value) pairs."""
    if isinstance(cache, TurboQuantKVCache):
        return tree_flatten(list(cache.compacted().state))
    if isinstance(cache, host.CacheList):
        return [pair for part in cache.caches for pair in state_of(part)]
    return tree_flatten({k: v for k, v in sorted(vars(cache).items()) if v is not None})


def same(a, b) -> bool:
    """Whether two values are equal; arrays bit by bit, up to what both have room for."""
    if not isinstance(a, mx.array):
        return a == b
    if a.ndim == 4:  # mlx_lm 0.31 saves a dense cache without the room behind its last token
        a, b = (x[:, :, : min(a.shape[2], b.shape[2])] for x in (a, b))
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.size == 0 or mx.array_equal(*(x.reshape(-1).view(mx.uint8) for x in (a, b))).item()


def assert_same(loaded, cache):
    assert [type(c) for c in loaded] == [type(c) for c in cache]
    for a, b in zip(loaded, cache, strict=True):
        pairs = zip(state_of(a), state_of(b), strict=True)
        assert all(x[0] == y[0] and same(x[1], y[1]) for x, y in pairs)


def saved_and_loaded(model, cache, tmp_path, metadata=None):
    file = tmp_path / "prompt.safetensors"
    save_prompt_cache(file, cache, model, metadata)
    return load_prompt_cache(file, model)


class TestReloadedEqualsNeverSaved:
    @pytest.mark.parametrize("count", [1, 15, 16, 33, PROMPT, 300])
    def test_at_every_length(self, model, tmp_path, count):
        cache = make_prompt_cache(model, TurboQuantConfig(4, 3, 32))
        model(tokens(count), cache=cache)
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert_same(loaded, cache)
        assert [c.layout.config for c in loaded] == [TurboQuantConfig(4, 3, 32)] * 3
        more = tokens(9, seed=3)
        assert mx.array_equal(model(more, cache=loaded), model(more, cache=cache))
        assert greedy(model, loaded, more[0], 20) == greedy(model, cache, more[0], 20)
        assert_same(loaded, cache)

    def test_with_nothing_in_it(self, model, tmp_path):
        loaded = saved_and_loaded(model, make_prompt_cache(model), tmp_path)
        assert greedy(model, loaded) == greedy(model, make_prompt_cache(model))

    def test_with_widths_and_centres_of_each_layer(self, model, tmp_path):
        measured = calibrate(model, tokens(100)[0].tolist())
        config = TurboQuantConfig.from_names("tq4", layers="1=q8_0/q2_0")
        cache = make_prompt_cache(model, config, calibration=measured)
        model(tokens(PROMPT), cache=cache)
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert_same(loaded, cache)
        assert mx.array_equal(loaded[1].sequences.centre.mu, measured.centres[1].mu)
        assert greedy(model, loaded) == greedy(model, cache)

    @pytest.mark.parametrize("preset", ["tq3", "tq2"])
    def test_with_trellis_codes(self, model, tmp_path, preset):
        cache = make_prompt_cache(model, TurboQuantConfig.from_names(preset))
        model(tokens(PROMPT), cache=cache)
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert_same(loaded, cache)
        assert [c.layout.config.label for c in loaded] == [preset] * 3
        assert greedy(model, loaded, count=3) == greedy(model, cache, count=3)

    @pytest.mark.parametrize(
        ("widths", "name"), [((3, 3), "q3_0/q3_0"), ((2, 2), "q2_0/q2_0"), ((19, 18), "t3/t2")]
    )
    def test_the_numbers_that_stand_for_widths_are_for_good(self, model, tmp_path, widths, name):
        cache = make_prompt_cache(model, TurboQuantConfig(*widths))
        model(tokens(PROMPT), cache=cache)
        (loaded, *_) = saved_and_loaded(model, cache, tmp_path)
        _, header = mx.load(str(tmp_path / "prompt.safetensors"), return_metadata=True)
        assert [layer["config"] for layer in json.loads(header["layers"])] == [[*widths, 16]] * 3
        assert tuple(loaded.state[1][1:4].tolist()) == (*widths, 16)
        assert loaded.layout.config.label == name

    def test_after_tokens_were_dropped(self, model, tmp_path):
        cache = make_prompt_cache(model, max_kv_size=48)
        for i in range(3):
            model(tokens(30, seed=i), cache=cache)
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert (loaded[0].offset, loaded[0].sequences.max_kv_size) == (90, 48)
        assert greedy(model, loaded) == greedy(model, cache)

    def test_after_a_trim(self, model, tmp_path):
        cache = make_prompt_cache(model)
        model(tokens(100), cache=cache)
        host.trim_prompt_cache(cache, 21)
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert greedy(model, loaded) == greedy(model, cache)

    def test_of_one_sequence_of_several(self, model, tmp_path):
        cache = make_prompt_cache(model)
        model(tokens(20, batch=3), cache=cache)
        with pytest.raises(ValueError, match=r"holds 3 sequences: save one, .*extract"):
            save_prompt_cache(tmp_path / "c.safetensors", cache, model)
        loaded = saved_and_loaded(model, [layer.extract(1) for layer in cache], tmp_path)
        more = tokens(3, seed=2, batch=3)
        expected = model(more, cache=cache)[1]
        assert mx.abs(model(more[1:2], cache=loaded)[0] - expected).max().item() < 1e-5

    def test_of_a_batch_of_one(self, model, tmp_path):
        cache = make_prompt_cache(model)
        model(tokens(20), cache=cache)
        batch = [layer.merge([layer]) for layer in cache]
        assert greedy(model, saved_and_loaded(model, batch, tmp_path)) == greedy(model, cache)

    def test_without_the_blocks_of_others_that_share_its_pool(self, model, tmp_path):
        pools = CachePools(model)
        cache, other = pools.make_prompt_cache(), pools.make_prompt_cache()
        model(tokens(300, seed=1), cache=other)
        model(tokens(20), cache=cache)
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert (tmp_path / "prompt.safetensors").stat().st_size < other[0].pool.pages.nbytes * 3
        more = tokens(5, seed=2)
        assert mx.array_equal(model(more, cache=loaded), model(more, cache=cache))

    def test_in_bfloat16(self, tmp_path):
        model = llama()
        model.set_dtype(mx.bfloat16)
        cache = make_prompt_cache(model)
        model(tokens(PROMPT), cache=cache)
        assert_same(saved_and_loaded(model, cache, tmp_path), cache)

    @pytest.mark.parametrize("kind", [sliding, hybrid, parallel, latent])
    @pytest.mark.parametrize("count", [0, 5, 20])
    def test_with_caches_of_mlx_lms_own(self, tmp_path, kind, count):
        model = kind()
        cache = make_prompt_cache(model)
        if count:
            model(tokens(count), cache=cache)
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert_same(loaded, cache)
        more = tokens(3, seed=3)
        assert mx.array_equal(model(more, cache=loaded), model(more, cache=cache))
        assert greedy(model, loaded) == greedy(model, cache)

    @pytest.mark.parametrize("count", [0, 90])
    def test_with_a_limit_and_windows(self, tmp_path, count):
        model = sliding()
        cache = make_prompt_cache(model, max_kv_size=48)
        if count:
            model(tokens(count), cache=cache)
            model(tokens(1), cache=cache)
            assert [c.size() for c in cache] == [27, 43, 27, 43]
        loaded = saved_and_loaded(model, cache, tmp_path)
        assert [c.offset for c in loaded] == [c.offset for c in cache]
        assert [c.sequences.window for c in loaded] == [8, 0, 8, 0]
        more = tokens(3, seed=3)
        assert mx.array_equal(model(more, cache=loaded), model(more, cache=cache))
        assert greedy(model, loaded) == greedy(model, cache)

    def test_with_an_empty_array_in_the_state(self, tmp_path):
        # mlx_lm's dense cache holds values of no elements where a model's keys serve as both.
        model = latent()
        cache = make_prompt_cache(model)
        for layer in cache:
            layer.update_and_fetch(mx.ones((1, 1, 3, 16)), mx.zeros((1, 1, 3, 0)))
        assert_same(saved_and_loaded(model, cache, tmp_path), cache)

    def test_the_metadata_comes_back(self, model, tmp_path):
        metadata = {"note": "tést\n", "checksum": '"checksum":"' + "0" * 64 + '"'}
        file = tmp_path / "prompt.safetensors"
        save_prompt_cache(file, make_prompt_cache(model), model, metadata)
        assert load_prompt_cache(file, model, return_metadata=True)[1] == metadata

    def test_whatever_the_files_name_became(self, model, tmp_path):
        save_prompt_cache(tmp_path / "a.safetensors", make_prompt_cache(model), model)
        (tmp_path / "a.safetensors").rename(tmp_path / "a.cache")
        assert load_prompt_cache(tmp_path / "a.cache", model)[0].empty()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model and a small file: ``(model, file, length of its header)``."""
    model = llama(
        num_hidden_layers=1, head_dim=8, hidden_size=8, num_attention_heads=1, num_key_value_heads=1
    )
    cache = make_prompt_cache(model, TurboQuantConfig(2, 2))
    model(tokens(3), cache=cache)
    file = tmp_path_factory.mktemp("saved") / "tiny.safetensors"
    save_prompt_cache(file, cache, model, {"note": "tiny"})
    return model, file, 8 + int.from_bytes(file.read_bytes()[:8], "little")


def refused(file, model):
    with pytest.raises(ValueError, match="is damaged") as error:
        load_prompt_cache(file, model)
    assert repr(str(file)) in str(error.value)
    assert "cache-prompt" in str(error.value)


class TestDamage:
    def test_a_file_cut_at_any_byte_is_refused(self, tiny, tmp_path):
        model, whole, _ = tiny
        file = tmp_path / "cut.safetensors"
        file.write_bytes(whole.read_bytes())
        load_prompt_cache(file, model)
        for length in reversed(range(file.stat().st_size)):
            os.truncate(file, length)
            refused(file, model)

    def test_a_file_with_more_behind_it_is_refused(self, tiny, tmp_path):
        model, whole, _ = tiny
        file = tmp_path / "long.safetensors"
        file.write_bytes(whole.read_bytes() + b"\0")
        refused(file, model)

    def flip(self, tiny, tmp_path, bits):
        model, whole, _ = tiny
        file = tmp_path / "flipped.safetensors"
        data = whole.read_bytes()
        file.write_bytes(data)
        with file.open("r+b", buffering=0) as f:
            for bit in bits:
                at, value = bit // 8, data[bit // 8]
                f.seek(at)
                f.write(bytes([value ^ 1 << bit % 8]))
                refused(file, model)
                f.seek(at)
                f.write(bytes([value]))
        load_prompt_cache(file, model)

    def test_any_bit_of_the_header_flipped_is_refused(self, tiny, tmp_path):
        self.flip(tiny, tmp_path, range(8 * tiny[2]))

    def test_a_bit_of_any_byte_of_the_data_flipped_is_refused(self, tiny, tmp_path):
        _, file, header = tiny
        self.flip(tiny, tmp_path, [8 * at + at % 8 for at in range(header, file.stat().st_size)])

    def test_nothing_is_parsed_before_the_checksum_holds(self, tiny, tmp_path, monkeypatch):
        model, whole, _ = tiny
        file = tmp_path / "x.safetensors"
        file.write_bytes(whole.read_bytes()[:-1])
        monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("it was parsed"))
        refused(file, model)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"not a cache",
            b"\0" * 4096,
            b"\xff" * 4096,
            b'\x50\0\0\0\0\0\0\0{"checksum":"' + BLANK + b'"}',
        ],
    )
    def test_a_file_of_another_kind_is_refused(self, tiny, tmp_path, content):
        file = tmp_path / "x.safetensors"
        file.write_bytes(content)
        refused(file, tiny[0])

    def test_safetensors_of_another_kind_are_refused(self, model, tmp_path):
        file = tmp_path / "weights.safetensors"
        mx.save_safetensors(str(file), {"weight": mx.zeros((3,))}, {"format": "mlx"})
        refused(file, model)
        cache = make_prompt_cache(model)
        model(tokens(5), cache=cache)
        host.save_prompt_cache(str(file), cache)
        refused(file, model)


def edited(file, change, arrays=None):
    """Write a file anew with another header, as a program would that seals what it writes."""
    old_arrays, header = mx.load(str(file), return_metadata=True)
    mx.eval(old_arrays)
    header = {**header, "checksum": BLANK.decode()}
    change(header)
    mx.save_safetensors(str(file), old_arrays | (arrays or {}), header)
    data = file.read_bytes()
    if data.count(b'"checksum":"' + BLANK) == 1:
        file.write_bytes(data.replace(BLANK, hashlib.sha256(data).hexdigest().encode(), 1))


class TestWhatIsRefused:
    @pytest.fixture
    def file(self, model, tmp_path):
        cache = make_prompt_cache(model, calibration=calibrate(model, tokens(100)[0].tolist()))
        model(tokens(PROMPT), cache=cache)
        save_prompt_cache(tmp_path / "prompt.safetensors", cache, model)
        return tmp_path / "prompt.safetensors"

    def test_an_edit_that_changes_nothing_is_not(self, model, file):
        edited(file, lambda header: None)
        assert load_prompt_cache(file, model)[0].size() == PROMPT

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("version", "2", "has version 2: 1 can be read; make it anew with"),
            ("version", "0", "has version 0: 1 can be read"),
            ("format", "another", "is no vllm-metal-tq prompt cache; make it anew with"),
            ("model", "0" * 32, "was made by another model"),
            ("calibration", "0" * 32, "contradicts itself: other centres"),
            ("layers", "[]", "was made by another model"),
            ("layers", "{", "contradicts itself"),
            ("layers", "[1, 2, 3]", "contradicts itself"),
            ("metadata", "", "contradicts itself"),
        ],
    )
    def test_another_header_under_a_seal_that_holds(self, model, file, field, value, message):
        edited(file, lambda header: header.update({field: value}))
        with pytest.raises(ValueError, match=re.escape(repr(str(file)) + " ") + message):
            load_prompt_cache(file, model)

    @pytest.mark.parametrize("metadata", ["[]", '{"a": 5}', '"a"', "[" * 100_000])
    def test_metadata_that_are_no_strings(self, model, file, metadata):
        edited(file, lambda header: header.update(metadata=metadata))
        with pytest.raises(ValueError, match=r"contradicts itself: "):
            load_prompt_cache(file, model)

    def test_metadata_that_are_no_strings_are_not_saved(self, model, tmp_path):
        file = tmp_path / "x.safetensors"
        with pytest.raises(ValueError, match=r"metadata .* must be strings"):
            save_prompt_cache(file, make_prompt_cache(model), model, {"a": 5})
        assert not file.exists()

    @pytest.mark.parametrize("shape", ["[1000000, 1000000]", "[0, 4294967296]", "[0, -1]", "[]"])
    def test_an_empty_array_that_is_none(self, model, file, shape):
        empty = f'{{"shape": {shape}, "dtype": "float32"}}'

        def change(header):
            header["layers"] = header["layers"].replace('{"array": "1.2"}', empty)

        edited(file, change)
        with pytest.raises(ValueError, match="contradicts itself: an empty array has shape"):
            load_prompt_cache(file, model)

    def test_a_pipe(self, model, tmp_path):
        os.mkfifo(tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="is no regular file"):
            load_prompt_cache(tmp_path / "x.safetensors", model)

    @pytest.mark.parametrize(
        "field", ["format", "version", "model", "layers", "metadata", "calibration"]
    )
    def test_a_field_that_is_missing(self, model, file, field):
        edited(file, lambda header: header.pop(field))
        with pytest.raises(ValueError, match=re.escape(repr(str(file)))):
            load_prompt_cache(file, model)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"config": [4, 4, 16]', '"config": [4, 3, 16]'),
            ('"array": "1.0"', '"array": "9.9"'),
            ('"class": "TurboQuantKVCache"', '"class": "KVCache"'),
            ('"class": "TurboQuantKVCache"', '"class": "_BaseCache"'),
            ('"class": "TurboQuantKVCache"', '"class": "create_attention_mask"'),
            ('"class": "TurboQuantKVCache"', '"class": "nothing"'),
        ],
    )
    def test_layers_that_contradict_themselves(self, model, file, old, new):
        def change(header):
            assert old in header["layers"]
            header["layers"] = header["layers"].replace(old, new)

        edited(file, change)
        with pytest.raises(ValueError, match=r"contradicts itself|another model"):
            load_prompt_cache(file, model)

    @pytest.mark.parametrize("depth", [1, 2])
    def test_a_plain_layer_in_a_list(self, model, file, depth):
        def wrap(header):
            first, *others = json.loads(header["layers"])
            for _ in range(depth):
                first = {"class": "CacheList", "parts": [first]}
            header["layers"] = json.dumps([first, *others])

        edited(file, wrap)
        with pytest.raises(ValueError, match="was made by another model, or by a release that"):
            load_prompt_cache(file, model)

    @pytest.mark.parametrize(
        "change",
        [
            lambda parts: parts[::-1],
            lambda parts: parts[:1],
            lambda parts: parts[1:],
            lambda parts: [*parts, parts[0]],
            lambda parts: [parts[1], parts[1]],
            lambda parts: [{"class": "CacheList", "parts": parts[:1]}, parts[1]],
            lambda parts: [{"class": "CacheList", "parts": parts}, parts[1]],
        ],
    )
    def test_other_parts_of_a_list(self, tmp_path, change):
        model, file = parallel(), tmp_path / "prompt.safetensors"
        cache = make_prompt_cache(model)
        model(tokens(5), cache=cache)
        save_prompt_cache(file, cache, model)

        def rearrange(header):
            first, *others = json.loads(header["layers"])
            first["parts"] = change(first["parts"])
            header["layers"] = json.dumps([first, *others])

        edited(file, rearrange)
        with pytest.raises(ValueError, match="was made by another model, or by a release that"):
            load_prompt_cache(file, model)

    @pytest.mark.parametrize("name", ["SharedKVCache", "FetchedKVCache"])
    def test_a_compressed_cache_for_another_reader(self, model, file, name):
        def rename(header):
            header["layers"] = header["layers"].replace("TurboQuantKVCache", name, 1)

        edited(file, rename)
        with pytest.raises(ValueError, match="was made by another model, or by a release that"):
            load_prompt_cache(file, model)

    @pytest.mark.parametrize(
        "value", [5, "text", [], {"array": "0.1.0"}, {"shape": [1, 0, 96], "dtype": "float32"}]
    )
    @pytest.mark.parametrize("place", [0, 1])
    def test_a_state_that_is_none_of_the_models(self, tmp_path, value, place):
        model, file = parallel(), tmp_path / "prompt.safetensors"
        cache = make_prompt_cache(model)
        model(tokens(5), cache=cache)
        save_prompt_cache(file, cache, model)

        def forge(header):
            layers = json.loads(header["layers"])
            state = layers[0]["parts"][0]["state"]
            (state[0] if isinstance(state[0], list) else state)[place] = value
            header["layers"] = json.dumps(layers)

        edited(file, forge)
        with pytest.raises(ValueError, match="contradicts itself: layer 0 has a state"):
            load_prompt_cache(file, model)

    def test_pages_that_do_not_fit(self, model, file):
        edited(file, lambda header: None, {"1.0": mx.zeros((2, 2, 7), mx.uint8)})
        with pytest.raises(ValueError, match=r"contradicts itself: pages .* do not fit"):
            load_prompt_cache(file, model)

    def test_caches_of_another_mlx_lm(self, tmp_path):
        model, file = hybrid(), tmp_path / "prompt.safetensors"
        save_prompt_cache(file, make_prompt_cache(model), model)
        load_prompt_cache(file, model)
        edited(file, lambda header: header.update(mlx_lm="0.30"))
        with pytest.raises(ValueError, match=r"holds ArraysCache of mlx_lm 0.30, which 0"):
            load_prompt_cache(file, model)

    def test_windows_that_an_earlier_release_left_uncompressed(self, tmp_path, monkeypatch):
        model, file = sliding(), tmp_path / "prompt.safetensors"
        ours, theirs = make_prompt_cache(model), host.make_prompt_cache(model)
        cache = [a if a.sequences.window == 0 else b for a, b in zip(ours, theirs, strict=True)]
        monkeypatch.setattr(saved, "_of_model", lambda *_: True)
        save_prompt_cache(file, cache, model)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"by a release that compressed other layers; make it"):
            load_prompt_cache(file, model)

    def test_windows_of_another_length(self, tmp_path, monkeypatch):
        model, file = sliding(), tmp_path / "prompt.safetensors"
        cache = make_prompt_cache(model)
        model(tokens(20), cache=cache)
        cache[0].sequences.window = 9
        with pytest.raises(ValueError, match="the cache was made for another model"):
            save_prompt_cache(file, cache, model)
        monkeypatch.setattr(saved, "_of_model", lambda *_: True)
        save_prompt_cache(file, cache, model)
        monkeypatch.undo()
        with pytest.raises(ValueError, match="was made by another model"):
            load_prompt_cache(file, model)

    def test_but_not_our_own_cache_under_another_mlx_lm(self, model, file):
        edited(file, lambda header: header.update(mlx_lm="0.30"))
        assert load_prompt_cache(file, model)[0].size() == PROMPT

    @pytest.mark.parametrize("other", [{"head_dim": 128}, {"num_hidden_layers": 2}])
    def test_a_model_of_another_shape(self, file, other):
        with pytest.raises(ValueError, match="was made by another model: load it with that one"):
            load_prompt_cache(file, llama(**other))

    def test_a_model_of_the_same_shape_with_other_weights(self, file):
        model = llama()
        model.update(tree_map(lambda x: x + 0.01, model.parameters()))
        with pytest.raises(ValueError, match="was made by another model"):
            load_prompt_cache(file, model)

    def test_a_cache_of_another_model_is_not_saved(self, model, tmp_path):
        file = tmp_path / "x.safetensors"
        for cache in (make_prompt_cache(llama(head_dim=128)), make_prompt_cache(model)[:2]):
            with pytest.raises(ValueError, match="is not saved: the cache was made for another"):
                save_prompt_cache(file, cache, model)
        with pytest.raises(ValueError, match="is not saved"):
            save_prompt_cache(file, host.make_prompt_cache(model), model)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_file(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors'?: no such file"):
            load_prompt_cache(tmp_path / "nowhere.safetensors", model)

    def test_a_folder(self, model, tmp_path):
        folder = tmp_path / "f.safetensors"
        folder.mkdir()
        with pytest.raises(ValueError, match="is a folder"):
            load_prompt_cache(folder, model)
        with pytest.raises(ValueError, match="is a folder"):
            save_prompt_cache(folder, make_prompt_cache(model), model)

    def test_a_name_without_the_suffix(self, model, tmp_path):
        with pytest.raises(ValueError, match=r"must end in .safetensors"):
            save_prompt_cache(tmp_path / "prompt.cache", make_prompt_cache(model), model)

    def test_a_folder_that_is_not_there(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            save_prompt_cache(tmp_path / "x" / "y.safetensors", make_prompt_cache(model), model)

    def test_what_cannot_be_saved(self, tmp_path):
        model = hybrid()
        cache = make_prompt_cache(model)
        model(tokens(3), cache=cache)
        cache[0].cache[0] = object()
        with pytest.raises(ValueError, match="holds object, which cannot be saved"):
            save_prompt_cache(tmp_path / "x.safetensors", cache, model)


def test_another_calibration_of_the_model_changes_nothing(model, tmp_path):
    # The file brings the centres that its pages were encoded with.
    first, second = (calibrate(model, tokens(100, seed)[0].tolist()) for seed in (0, 1))
    cache = make_prompt_cache(model, calibration=first)
    model(tokens(PROMPT), cache=cache)
    loaded = saved_and_loaded(model, cache, tmp_path)
    assert not mx.array_equal(loaded[1].sequences.centre.mu, second.centres[1].mu)
    assert greedy(model, loaded) == greedy(model, cache)


class TestAnInterruptedSave:
    @pytest.fixture
    def file(self, model, tmp_path):
        cache = make_prompt_cache(model)
        model(tokens(PROMPT), cache=cache)
        save_prompt_cache(tmp_path / "prompt.safetensors", cache, model)
        return tmp_path / "prompt.safetensors"

    @pytest.mark.parametrize("where", ["save_safetensors", "seal"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_leaves_what_was_there_and_nothing_else(self, model, file, monkeypatch, where, error):
        write = mx.save_safetensors

        def half(stream, *rest):
            if rest:
                write(stream, *rest)
            stream.truncate(1000)
            raise error

        before = file.read_bytes()
        owner, name = (saved, "_seal") if where == "seal" else (mx, "save_safetensors")
        monkeypatch.setattr(owner, name, half)
        with pytest.raises(error):
            save_prompt_cache(file, make_prompt_cache(model), model)
        assert file.read_bytes() == before
        assert list(file.parent.iterdir()) == [file]

    def test_a_save_replaces_what_was_there(self, model, file):
        save_prompt_cache(file, make_prompt_cache(model), model)
        assert load_prompt_cache(file, model)[0].empty()
        assert list(file.parent.iterdir()) == [file]


class TestModelFingerprint:
    def test_it_is_the_same_for_the_same_model(self):
        assert saved.model_fingerprint(llama()) == saved.model_fingerprint(llama())

    def test_every_weight_counts(self, model):
        before = saved.model_fingerprint(model)
        for name, weight in tree_flatten(model.parameters()):
            other = llama()
            other.load_weights([(name, weight + 0.01)], strict=False)
            assert saved.model_fingerprint(other) != before, name

    @pytest.mark.parametrize(
        "other",
        [
            {"rope_theta": 1e6},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_traditional": True},
        ],
    )
    def test_rope_counts_though_it_has_no_weights(self, model, other):
        assert saved.model_fingerprint(llama(**other)) != saved.model_fingerprint(model)

    def test_types_count(self, model):
        other = llama()
        other.set_dtype(mx.float16)
        assert saved.model_fingerprint(other) != saved.model_fingerprint(model)

    def test_quantised_weights_count(self):
        made = partial(nn.quantize, group_size=32, bits=4)
        first, second = llama(), llama()
        made(first)
        made(second)
        assert saved.model_fingerprint(first) == saved.model_fingerprint(second)
        layer = second.layers[1].mlp.up_proj
        layer.weight = layer.weight ^ 1
        assert saved.model_fingerprint(first) != saved.model_fingerprint(second)
