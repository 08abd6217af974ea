"""A small model with linear attention in three layers of four, in the real ``vllm serve``."""

import re
from pathlib import Path

import demo_folder
import mlx.core as mx
import models
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from vllm_process import serve

from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.integrations.mlx_lm import make_prompt_cache
from vllm_metal_tq.layout import PageLayout

CONFIG = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 4096,
    "full_attention_interval": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 0,
    "num_experts_per_tok": 1,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
STATE_BYTES = 4 * (4 * 32 * 32 + 3 * (2 * 2 * 32 + 4 * 32))  # recurrence and convolution, float32
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model in the form that vLLM reads."""
    target = demo_folder.write_config_only(tmp_path_factory.mktemp("model") / "hybrid", CONFIG)
    model = models.build(**CONFIG)
    # Random weights as they come hardly differ from token to token.
    weights = {name: 3 * x if x.ndim > 1 else x for name, x in tree_flatten(model.parameters())}
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    return target


def expected(folder, prompt):
    model, _ = load_model(Path(folder))
    cache = make_prompt_cache(model, TurboQuantConfig.from_names("tq4"))
    step, tokens = mx.array([prompt]), []
    for _ in range(TOKENS):
        step = mx.argmax(model(step, cache=cache)[:, -1:], axis=-1)
        tokens.append(step.item())
    return tokens


def test_a_hybrid_model_has_the_tokens_of_this_library(folder, tmp_path):
    settings = {"turboquant": True, "preset": "tq4", "calibration": False}
    flags = ("--max-model-len", "1024", "--max-num-seqs", "2")
    prompts = [list(range(first, first + 90)) for first in (100, 2000)]
    eager = {"VLLM_METAL_GDN_LAZY_KERNELS": "0"}  # which are Metal text
    with serve(folder, tmp_path / "log", settings, flags, **eager) as server:
        found = [server.tokens(prompt, TOKENS) for prompt in prompts]
        assert found == [expected(folder, prompt) for prompt in prompts]
        assert found[0] != found[1]
        ((block_size,),) = [re.findall(r"blocks of (\d+) tokens hold a state", server.log)[:1]]
    layout = PageLayout(TurboQuantConfig.from_names("tq4"), CONFIG["head_dim"])
    page = CONFIG["num_key_value_heads"] * layout.row_bytes
    assert 0 <= int(block_size) * page - STATE_BYTES < 16 * page
