import math

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import numpy as np
import pytest
from models import build, llama, tokens

from vllm_metal_tq import calibration, make_prompt_cache, rope
from vllm_metal_tq.centre import turn
from vllm_metal_tq.integrations.mlx_lm import calibrate, hook, measure
from vllm_metal_tq.integrations.mlx_lm.measure import from_biases, layer_ropes


@pytest.fixture(scope="module", autouse=True)
def model():
    model = llama()
    hook.install(model)
    return model


@pytest.fixture(scope="module")
def measured(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "WORTH", -math.inf)
        return calibrate(model, tokens(300)[0].tolist())


@pytest.fixture
def every_layer(monkeypatch):
    """Layers get a centre whatever it is worth."""
    monkeypatch.setattr(calibration, "WORTH", -math.inf)


def recorded(model, ids):
    """Keys and values of every layer, ``(num_kv_heads, n, head_dim)``, from a dense cache."""
    caches = host.make_prompt_cache(model)
    model(ids, cache=caches)
    count = ids.shape[1]
    return [(cache.keys[0, :, :count], cache.values[0, :, :count]) for cache in caches]


def test_means_are_those_of_keys_before_rope_and_of_values(model, measured):
    pairs = rope.probe(model.layers[0].self_attn.rope, 64).pairs
    for centre, (keys, values) in zip(measured.centres, recorded(model, tokens(300)), strict=True):
        before = turn(keys, mx.arange(300), pairs, inverse=True)[:, 4:]
        assert mx.abs(centre.mu - before.mean(axis=1)).max().item() < 1e-4
        assert mx.abs(centre.value_mean - values[:, 4:].mean(axis=1)).max().item() < 1e-5


def test_smoothing_evens_out_queries_and_keys():
    statistics = calibration.Statistics(rope.constant(4))
    spread = mx.array([1.0, 1.0, 4.0, 4.0])
    keys = 1000 + spread * mx.random.normal((1, 1, 20000, 4), key=mx.random.key(0))
    queries = mx.random.normal((1, 2, 20000, 4), key=mx.random.key(1))
    statistics.add(queries, keys, keys, 0)
    t = statistics.centre().smoothing[0]
    # (E[q^2] / E[(k - mu)^2])^(1/8): 1 and 16^(-1/8), less their geometric mean.
    expected = np.repeat([16 ** (1 / 16), 16 ** (-1 / 16)], 2)
    assert np.array(t) == pytest.approx(expected, rel=0.01)


def test_statistics_of_no_tokens_have_no_centre():
    with pytest.raises(ValueError, match="a centre needs tokens: none were added"):
        calibration.Statistics(rope.constant(4)).centre()


def statistics_of(keys, values, queries=None):
    """Statistics of two KV heads, ``(1, 2, n, 4)`` each, without an embedding."""
    statistics = calibration.Statistics(rope.constant(4))
    statistics.add(normal(5) if queries is None else queries, keys, values, 0)
    return statistics


def normal(seed):
    return mx.random.normal((1, 2, 1000, 4), key=mx.random.key(seed))


def test_a_layer_without_means_gets_no_centre():
    assert statistics_of(normal(0), normal(1)).centre() is None


# A mean m of each of the elements, whose spread is 1, is m^2 / (1 + m^2) of the square.
@pytest.mark.parametrize(("mean", "worth"), [(0.15, False), (0.3, True)])
def test_means_of_keys_or_of_values_have_to_be_worth_it(mean, worth):
    assert (statistics_of(normal(0) + mean, normal(1)).centre() is not None) == worth
    assert (statistics_of(normal(0), normal(1) + mean).centre() is not None) == worth


def test_one_head_in_two_counts_by_half():
    of_one = mx.array([0.3, 0.0])[:, None, None]
    assert statistics_of(normal(0) + of_one, normal(1)).centre() is None
    assert statistics_of(normal(0) + 2 * of_one, normal(1)).centre() is not None


def test_smoothing_alone_can_be_worth_it():
    spread = mx.array([1.0, 1.0, 9.0, 9.0])
    assert statistics_of(normal(0) * spread, normal(1)).centre() is not None
    # Where queries are large as well, there is nothing to even out.
    loud = normal(2) * spread
    assert statistics_of(normal(0) * spread, normal(1), loud).centre() is None


def test_a_random_models_first_layer_has_nothing_to_centre(model, tmp_path):
    # Later layers have: their input is a mean over tokens.
    some = calibrate(model, tokens(300)[0].tolist())
    assert [centre is None for centre in some.centres] == [True, False, False]
    some.save(tmp_path / "c.safetensors")
    loaded = calibration.load(tmp_path / "c.safetensors", model)
    assert [centre is None for centre in loaded.centres] == [True, False, False]
    logits = model(tokens(40), cache=make_prompt_cache(model, calibration=loaded))
    assert mx.isfinite(logits).all()


def test_chunks_do_not_matter(model, measured, every_layer, monkeypatch):
    monkeypatch.setattr(measure, "CHUNK", 70)
    again = calibrate(model, tokens(300)[0].tolist())
    for a, b in zip(again.centres, measured.centres, strict=True):
        for x, y in zip(a.arrays[1:], b.arrays[1:], strict=True):
            assert mx.allclose(x, y, atol=1e-3)


def test_a_text_that_is_too_short_is_refused(model):
    with pytest.raises(ValueError, match="the text has 63 tokens"):
        calibrate(model, [1] * 63)


class TestRopes:
    """The embedding that the model itself applies is found among its modules."""

    def test_of_a_plain_model(self, model):
        expected = rope.probe(model.layers[0].self_attn.rope, 64).pairs
        assert all(np.array_equal(found.pairs, expected) for found in layer_ropes(model))

    def test_of_layers_that_differ(self):
        model = llama(num_hidden_layers=2)
        model.layers[1].self_attn.rope = nn.RoPE(64, base=1e6)
        first, second = layer_ropes(model)
        assert not np.array_equal(first.pairs, second.pairs)
        expected = rope.probe(model.layers[1].self_attn.rope, 64).pairs
        assert np.array_equal(second.pairs, expected)

    def test_of_a_model_without_any(self):
        model = llama(num_hidden_layers=1)
        model.layers[0].self_attn.rope = lambda x, offset=0: x
        assert not layer_ropes(model)[0].pairs[:, 2].any()

    def test_that_is_not_known_leaves_the_mean_of_keys_after_it(self, every_layer):
        model = llama(num_hidden_layers=1)
        plain = model.layers[0].self_attn.rope
        # Turns, but not as any module by itself does.
        model.layers[0].self_attn.rope = lambda x, offset=0: plain(x[..., ::-1], offset=offset)
        assert layer_ropes(model) == [None]
        (centre,) = calibrate(model, tokens(100)[0].tolist()).centres
        ((keys, _),) = recorded(model, tokens(100))
        assert not centre.pairs[:, 2].any()
        assert mx.abs(centre.mu - keys[:, 4:].mean(axis=1)).max().item() < 1e-4

    @pytest.mark.parametrize(
        ("model_type", "arguments", "turning", "amplitude"),
        [
            ("qwen3", {"head_dim": 64, "tie_word_embeddings": True}, 32, 1.0),
            ("phi3", {"partial_rotary_factor": 0.5}, 4, 1.0),
            ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True, "head_dim": 64}, 16, 1),
            (
                "cohere",
                {"layer_norm_eps": 1e-5, "use_qk_norm": False, "logit_scale": 1.0},
                8,
                1.0,
            ),
            (
                "gpt_oss",
                {
                    "head_dim": 64,
                    "num_local_experts": 2,
                    "num_experts_per_tok": 1,
                    "sliding_window": 8,
                    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                    "rope_scaling": {
                        "rope_type": "yarn",
                        "factor": 32.0,
                        "original_max_position_embeddings": 4096,
                    },
                },
                32,
                0.1 * math.log(32) + 1,
            ),
        ],
    )
    def test_of_models_of_many_kinds(self, model_type, arguments, turning, amplitude):
        for found in filter(None, layer_ropes(build(model_type, **arguments))):
            assert (found.pairs[:, 2] > 0).sum() == turning
            assert found.amplitude[0] == pytest.approx(amplitude)
            adjacent = (found.pairs[:turning, 1] == found.pairs[:turning, 0] + 1).all()
            assert adjacent == (model_type in ("glm4", "cohere"))

    def test_of_layers_that_use_none(self):
        ropes = layer_ropes(build("smollm3", no_rope_layer_interval=2))
        assert [bool(found.pairs[:, 2].any()) for found in ropes] == [True, False, True]

    def test_of_windows_is_their_own(self, every_layer):
        fields = {"sliding_window": 48, "sliding_window_pattern": 2, "head_dim": 64}
        bases = {"rope_local_base_freq": 1e4, "rope_theta": 1e6}
        model = build("gemma3_text", num_hidden_layers=4, **fields, **bases)
        expected = [rope.probe(nn.RoPE(64, base=b), 64).pairs for b in (1e4, 1e6)] * 2
        for found, pairs in zip(layer_ropes(model), expected, strict=True):
            assert np.array_equal(found.pairs, pairs)
        centres = calibrate(model, tokens(300)[0].tolist()).centres
        for centre, pairs in zip(centres, expected, strict=True):
            assert np.array_equal(centre.pairs, pairs)

    def test_of_learned_positions_is_none(self, every_layer):
        sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 4096, "n_ctx": 4096}
        model = build("gpt2", **sizes, layer_norm_epsilon=1e-5)
        (keys, _), *_ = recorded(model, tokens(100))
        centre, *_ = calibrate(model, tokens(100)[0].tolist()).centres
        assert mx.abs(centre.mu - keys[:, 4:].mean(axis=1)).max().item() < 1e-4


class TestBiases:
    def biased(self, model_type="qwen2", **arguments):
        model = build(model_type, **arguments)
        for layer in model.layers:
            attention = layer.self_attn
            attention.k_proj.bias = mx.random.normal(attention.k_proj.bias.shape) * 5
        return model

    def test_are_the_centre_without_a_calibration(self):
        model = self.biased(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
        cache = make_prompt_cache(model)
        for layer, ours in zip(model.layers, cache, strict=True):
            bias = layer.self_attn.k_proj.bias.reshape(1, 64)
            assert mx.array_equal(ours.sequences.centre.mu, bias)
            assert (ours.sequences.centre.smoothing == 1).all()

    def test_are_scaled_like_the_keys(self):
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
        model = self.biased(
            hidden_size=128,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_scaling=scaling,
        )
        (centre, *_) = from_biases(model).centres
        bias = model.layers[0].self_attn.k_proj.bias.reshape(1, 64)
        assert mx.allclose(centre.mu, bias * (0.1 * math.log(4) + 1))

    def test_that_are_not_there_leave_no_centre(self, model):
        assert from_biases(model).centres == (None,) * 3
        assert all(cache.sequences.centre is None for cache in make_prompt_cache(model))


class TestFile:
    @pytest.fixture
    def file(self, measured, tmp_path):
        measured.save(tmp_path / "new" / "c.safetensors")
        return tmp_path / "new" / "c.safetensors"

    def test_what_is_loaded_is_what_was_saved(self, model, measured, file):
        loaded = calibration.load(file, model)
        for a, b in zip(loaded.centres, measured.centres, strict=True):
            assert all(map(mx.array_equal, a.arrays, b.arrays))
        assert file.stat().st_size < 20_000
        assert [f.name for f in file.parent.iterdir()] == ["c.safetensors"]

    def test_a_layer_without_a_centre_comes_back_as_such(self, model, measured, tmp_path):
        centres = (None, *measured.centres[1:])
        calibration.Calibration(centres, measured.fingerprint).save(tmp_path / "c.safetensors")
        loaded = calibration.load(tmp_path / "c.safetensors", model)
        assert [c is None for c in loaded.centres] == [True, False, False]

    def test_another_models_is_refused(self, file):
        with pytest.raises(ValueError, match="was measured on another model"):
            calibration.load(file, llama(num_hidden_layers=2))
        other = llama()
        other.update({"model": {"embed_tokens": {"weight": mx.ones((97, 64))}}})
        with pytest.raises(ValueError, match="was measured on another model"):
            calibration.load(file, other)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
    def test_a_file_cut_short_is_refused(self, model, file, share):
        data = file.read_bytes()
        file.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match="is damaged or foreign"):
            calibration.load(file, model)

    def test_a_file_of_another_version_is_refused(self, model, measured, file, monkeypatch):
        monkeypatch.setattr(calibration, "_VERSION", "0")
        measured.save(file)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"has version 0: 1 can be read; make it anew"):
            calibration.load(file, model)

    def test_a_file_of_another_kind_is_refused(self, model, file):
        mx.save_safetensors(str(file), {"weight": mx.zeros(3)})
        with pytest.raises(ValueError, match="is damaged or foreign"):
            calibration.load(file, model)

    @pytest.mark.parametrize(
        ("name", "bad"),
        [
            ("1.smoothing", mx.zeros((2, 64))),
            ("1.mu", mx.full((2, 64), math.nan)),
            ("1.pairs", mx.zeros((32, 3), mx.uint32)),
            ("1.value_mean", mx.zeros((2, 32))),
        ],
    )
    def test_arrays_out_of_range_are_refused(self, model, file, name, bad):
        arrays, metadata = mx.load(str(file), return_metadata=True)
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays | {name: bad}, metadata)
        with pytest.raises(ValueError, match="is damaged or foreign: no centre of 2 KV heads"):
            calibration.load(file, model)

    @pytest.mark.parametrize("layers", ["-1", "999999999999", "three", ""])
    def test_a_count_of_layers_that_no_model_has_is_refused(self, model, file, layers):
        arrays, metadata = mx.load(str(file), return_metadata=True)
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays, metadata | {"layers": layers})
        with pytest.raises(ValueError, match="is damaged or foreign: "):
            calibration.load(file, model)

    def test_means_without_a_shape_are_refused(self, model, file):
        arrays, metadata = mx.load(str(file), return_metadata=True)
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays | {"1.mu": mx.array(1.0)}, metadata)
        with pytest.raises(ValueError, match=r"layer 1 has mean keys of shape \(\)"):
            calibration.load(file, model)

    def test_a_missing_file_is_named(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere'?: no such file"):
            calibration.load(tmp_path / "nowhere", model)

    def test_it_is_found_beside_the_model_before_the_cache_directory(
        self, model, measured, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(calibration, "user_cache_path", lambda name: tmp_path / name)
        assert calibration.find(model, tmp_path) is None
        measured.save(calibration.place(model))
        assert calibration.find(model, tmp_path) is not None
        (tmp_path / calibration.FILE_NAME).write_bytes(b"broken")
        with pytest.raises(ValueError, match=calibration.FILE_NAME):
            calibration.find(model, tmp_path)


def test_a_calibration_of_another_shape_is_refused(measured):
    with pytest.raises(ValueError, match="a model of another shape"):
        make_prompt_cache(llama(head_dim=128), calibration=measured)
    with pytest.raises(ValueError, match="a model of another shape"):
        make_prompt_cache(llama(num_hidden_layers=2), calibration=measured)


def test_fingerprints_tell_models_apart():
    one, same, other = llama(), llama(), llama(intermediate_size=128)
    assert calibration.fingerprint(one) == calibration.fingerprint(same)
    assert calibration.fingerprint(one) != calibration.fingerprint(other)
    one.set_dtype(mx.float16)
    assert calibration.fingerprint(one) != calibration.fingerprint(same)
