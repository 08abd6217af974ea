import itertools

import pytest
from shipped import NAMES

from vllm_metal_tq.plan import models
from vllm_metal_tq.plan.layers import Layer
from vllm_metal_tq.plan.sources import shipped

PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
}
"""As published with the models."""

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}

SHARED = {"model_type": "gemma4_text", "sliding_window": 64}


def read(**changes):
    return models.read("it", CONFIG | changes)


def read_shipped(name):
    return models.read(name, shipped()[name]["config"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_are_as_large_as_published(name):
    model = read_shipped(name)
    assert model.weight_bytes(16) == pytest.approx(2 * PARAMETERS[name], rel=0.01)
    assert model.weights.count == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_model_says_where_its_numbers_come_from(name):
    entry = shipped()[name]
    assert entry["source"]
    assert entry["ids"]
    assert read_shipped(name).max_position >= 8192


def test_grouped_query_attention_keeps_its_kv_heads():
    assert set(read_shipped("llama-3.1-8b").layers) == {Layer(8, 128, 128)}


def test_only_attention_layers_of_a_hybrid_model_grow():
    layers = read_shipped("qwen3.5-9b").layers
    growing = [i for i, layer in enumerate(layers) if layer.kv_heads]
    assert growing == list(range(3, 32, 4))
    # 3 inputs of 8,192 channels in bf16, and 32 matrices of 128 x 128 in float32
    assert {x.state_bytes for x in layers if not x.kv_heads} == {2 * 3 * 8192 + 4 * 32 * 128 * 128}


@pytest.mark.parametrize(
    ("name", "window", "full"),
    [("gemma-3-1b", 512, 4), ("gemma-3-4b", 1024, 5), ("gpt-oss-20b", 128, 12)],
)
def test_windows_and_full_attention(name, window, full):
    layers = read_shipped(name).layers
    assert {layer.window for layer in layers} == {0, window}
    assert sum(not layer.window for layer in layers) == full


def test_head_dims_of_gemma_4_differ_by_layer_and_the_last_layers_have_no_cache():
    layers = read_shipped("gemma-4-e2b").layers
    assert len(layers) == 15
    assert [(x.key_dim, x.window) for x in layers[:5]] == [(256, 512)] * 4 + [(512, 0)]
    assert [i for i, layer in enumerate(layers) if layer.shared] == [13, 14]


def test_latents_are_kept_as_they_are():
    latent = {
        **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128},
        **{"v_head_dim": 128, "q_lora_rank": None},
    }
    layers = read(model_type="deepseek_v3", **latent).layers
    assert layers == (Layer(1, 512, 64),) * 2
    assert not layers[0].is_attention


def test_experts_count_as_weights_and_a_token_reads_a_few():
    model = read_shipped("gpt-oss-20b")
    one, eight = (model.weights.read_by(n).count for n in (1, 8))
    assert one / model.weights.count == pytest.approx(0.15, abs=0.03)
    assert eight - one == pytest.approx(model.weights.experts * 28 / 32)
    assert model.weights.read_by(100) == model.weights.read_by(8)


def test_tied_embeddings_count_once():
    tied, untied = (read(tie_word_embeddings=each).weights for each in (True, False))
    assert untied.count - tied.count == 128 * 256
    assert untied.read_by(1).count == tied.read_by(1).count


def test_layer_types_of_the_config_take_precedence():
    layers = read(layer_types=["full_attention", "sliding_attention"], sliding_window=64).layers
    assert [layer.window for layer in layers] == [0, 64]


def test_four_bits_take_half_a_byte_and_a_scale_and_a_bias_for_64():
    model = read()
    matrices = model.weights.matrices
    assert model.weight_bytes(4) == matrices // 2 + matrices // 16 + 2 * model.weights.vectors


def test_weights_are_as_published_where_no_bits_are_named():
    assert read().weight_bytes(None) == read().weight_bytes(16)
    quantised = read(quantization={"bits": 8, "group_size": 64})
    assert quantised.weight_bytes(None) == read().weight_bytes(8)
    published = read_shipped("gpt-oss-20b").weight_bytes(None)
    assert published == pytest.approx(13.76e9, rel=0.01)  # the size of its safetensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not known, allowed are llama, mistral"),
        ({"model_type": None}, "model_type None is not known"),
        ({"hidden_size": None}, "its config gives nothing for hidden_size, expected a number"),
        ({"vocab_size": "many"}, "its config gives 'many' for vocab_size"),
        ({"num_hidden_layers": 0}, "it: its config has no attention layers"),
        ({"num_key_value_heads": -2}, "gives -2 for num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "layer_types must name each of 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "allowed are full_attention, sliding_"),
        ({"layer_types": 2}, "gives 2 for layer_types, expected a list"),
        ({"num_key_value_heads": 0}, "it: its config has no attention layers"),
        ({"num_attention_heads": 0}, "gives 0 for num_attention_heads.*at least 1"),
        ({"quantization": [4]}, r"gives \[4\] for quantization"),
        (SHARED | {"num_kv_shared_layers": 2}, "num_kv_shared_layers leaves no layers"),
        ({"num_hidden_layers": 10**9}, "gives 1000000000 for num_hidden_layers.* 10000 at most"),
        (
            {"vocab_size": 10**400},
            "0 for vocab_size, expected a number of at least 0, 1099511627776",
        ),
    ],
)
def test_what_is_not_known_gets_one_clear_error(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(**changes)
    assert str(raised.value).startswith("it: ")


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "'awq' in 4 bits"),
        ({"mode": "mxfp4", "bits": 4, "group_size": 32}, "'mxfp4' in 4 bits and groups of 32"),
        ({"bits": 4, "group_size": 0}, "groups of 0"),
        ({"bits": 4, "group_size": "64"}, "groups of '64'"),
        ({"bits": 7, "group_size": 64}, "in 7 bits"),
        ({"bits": 4}, "groups of None"),
    ],
)
def test_an_unknown_weight_format_asks_for_bits(said, named):
    model = read(quantization=said)
    with pytest.raises(ValueError, match=rf"quantised by .*{named}.*say --weights-bits"):
        model.weight_bytes(None)
    assert model.weight_bytes(4) == read().weight_bytes(4)


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="7 bits a weight: allowed are 2, 3, 4, 5, 6, 8, 16"):
        read().weight_bytes(7)


JUNK = [None, -1, 0, 1, 3, 10**6, 1.5, True, "x", "8", [], ["x"], [["x"]], {}, {"a": 1}]


def said_of(name, config):
    """The model's name, or why it is refused."""
    try:
        return models.read(name, config).name
    except ValueError as refusal:
        return str(refusal)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-4-e2b", "gpt-oss-20b", "qwen3.5-9b"])
def test_whatever_a_config_says_it_is_read_or_refused_in_one_line(name):
    config = shipped()[name]["config"]
    text = config.get("text_config", config)
    keys = {*text, "quantization", "mlp_only_layers", "sliding_window_pattern", "num_experts"}
    for key, value in itertools.product(sorted(keys), JUNK):
        if (key, value) == ("num_hidden_layers", 10**6):
            continue  # a million layers, as asked
        changed = text | {key: value}
        changed = config | {"text_config": changed} if "text_config" in config else changed
        assert said_of(name, changed).startswith(name)
