"""A mistake in the configuration ends ``vllm serve`` with one message, before the engine starts."""

import re

import demo_folder
import pytest
from vllm_process import refused

ON = {"turboquant": True}
MISTAKES = {
    "unknown key": (ON | {"prest": "tq4"}, ["prest", "preset", "k_quant", "block_size"]),
    "switch of a wrong type": ({"turboquant": "yes"}, ["turboquant", "'yes'"]),
    "number of a wrong type": (ON | {"block_size": "large"}, ["block_size", "'large'"]),
    "layers of a wrong type": (ON | {"layer_overrides": 3}, ["layer_overrides", "3"]),
    "unknown preset": (ON | {"preset": "tq99"}, ["preset", "tq99", "tq4"]),
    "unknown quant": (ON | {"k_quant": "q9_7"}, ["k_quant", "q9_7", "q4_0"]),
}
DEEPSEEK = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    "vocab_size": 49152,
    "torch_dtype": "float32",
}
STARTED = ("EngineCore pid=", "loaded in")  # what only follows a good configuration
# A ValueError is shown by pydantic, which vLLM's configuration is made with; others by Python.
ERROR = re.compile(r"(?:\(\w+ pid=\d+\) )?\s*(Value error, |\w+Error: )")


def assert_one_message(printed, words):
    """One error is printed, with all the words, at the end, and no engine was started."""
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    assert len(errors) == 1, printed[-5000:]
    assert errors[0] in lines[-2:], printed[-5000:]
    assert [word for word in words if word not in errors[0]] == [], errors[0]
    assert [sign for sign in STARTED if sign in printed] == [], printed[-5000:]


@pytest.mark.parametrize(("additional", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistaken_setting_is_refused(model_folder, tmp_path, additional, words):
    printed = refused(model_folder, tmp_path / "log", additional)
    assert_one_message(printed, words)


def test_compression_without_paged_attention_is_refused(model_folder, tmp_path):
    printed = refused(model_folder, tmp_path / "log", ON, VLLM_METAL_USE_PAGED_ATTENTION="0")
    assert_one_message(printed, ["VLLM_METAL_USE_PAGED_ATTENTION"])


def test_a_model_with_latent_attention_is_refused(tmp_path):
    model = demo_folder.write_config_only(tmp_path / "deepseek-tiny", DEEPSEEK)
    printed = refused(model, tmp_path / "log", ON)
    assert_one_message(printed, ["NotImplementedError", "deepseek-tiny", "MLA", "layers.0"])
