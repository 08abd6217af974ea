"""What the planner reads of a config is what mlx_lm makes of it."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import pytest
from mlx_lm.models import deepseek_v3, llama, mixtral, qwen3_5, qwen3_moe, qwen3_next
from shipped import NAMES, mlx_lm_model, weights

from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.integrations.mlx_lm import CachePools, hook
from vllm_metal_tq.integrations.mlx_lm.probe import plain_attention
from vllm_metal_tq.plan import models
from vllm_metal_tq.plan.caches import MlxCache, Scheme
from vllm_metal_tq.plan.sources import shipped

TQ4 = Scheme("tq4", TurboQuantConfig(4, 4))


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """The planner's model and mlx_lm's, of a shipped config."""
    config = shipped()[request.param]["config"]
    return models.read(request.param, config), mlx_lm_model(config)


def test_the_same_number_of_parameters(pair):
    ours, theirs = pair
    assert ours.weights.count == sum(x.size for x in weights(theirs))


def test_the_same_caches(pair):
    ours, theirs = pair
    caches = hook.host_caches(theirs)
    assert [layer.window for layer in ours.layers] == [getattr(c, "max_size", 0) for c in caches]
    theirs(mx.zeros((1, 1), mx.int32), cache=caches)
    states = [sum(x.nbytes for x in c.cache) if hasattr(c, "cache") else 0 for c in caches]
    assert [layer.state_bytes for layer in ours.layers] == states


def test_the_same_layers_are_compressed(pair):
    ours, theirs = pair
    hook.install(theirs)
    cache = MlxCache(ours, TQ4)
    planned = [(x.key_dim, x.kv_heads) if cache.compresses(x) else None for x in ours.layers]
    assert planned == plain_attention(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bytes_of_quantised_weights(name):
    config = shipped()[name]["config"]
    theirs = mlx_lm_model(config)
    chosen = getattr(theirs, "quant_predicate", None) or (lambda *module: True)

    def predicate(path, module):
        whole = hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0
        return whole and chosen(path, module)

    nn.quantize(theirs, 64, 4, class_predicate=predicate)
    theirs = sum(x.nbytes for x in weights(theirs))
    # Routers of experts get 8 bits, which the planner does not know.
    assert models.read(name, config).weight_bytes(4) == pytest.approx(theirs, rel=2e-4)


MOE = {
    **{"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "vocab_size": 97},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4},
    **{"num_experts_per_tok": 2, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    **{"moe_intermediate_size": 64, "norm_topk_prob": True, "tie_word_embeddings": False},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 512},
}
DELTA_NET = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64},
    **{"linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "full_attention_interval": 2},
    **{"shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.25},
}
EVERY_LAYER = {"mlp_only_layers": [], "decoder_sparse_step": 1}
LATENT = {
    **{"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 97},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4},
    **{"n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 64, "q_lora_rank": 64},
    **{"qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "n_group": 1},
    **{"topk_group": 1, "tie_word_embeddings": False},
}


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (qwen3_moe, {"model_type": "qwen3_moe", **MOE}),
        (qwen3_next, {"model_type": "qwen3_next", **MOE, **DELTA_NET}),
        (qwen3_5, {"model_type": "qwen3_5_moe", "text_config": MOE | DELTA_NET | EVERY_LAYER}),
        (mixtral, {"model_type": "mixtral", **MOE, "num_local_experts": 4, "head_dim": None}),
        (deepseek_v3, {"model_type": "deepseek_v3", **LATENT}),
        (llama, {"model_type": "mistral", **MOE, "attention_bias": True, "mlp_bias": True}),
    ],
    ids=["experts", "states", "experts and states", "mixtral", "latents", "biases"],
)
def test_model_types_of_which_none_is_shipped(module, config):
    if module in (llama, mixtral):
        other = {"num_experts", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"}
        config = {k: v for k, v in config.items() if k not in other and v is not None}
    theirs = module.Model(module.ModelArgs.from_dict(config))
    theirs.set_dtype(mx.bfloat16)
    ours = models.read("tiny", config)
    assert ours.weights.count == sum(x.size for x in weights(theirs))
    caches = host.make_prompt_cache(theirs)
    theirs(mx.zeros((1, 1), mx.int32), cache=caches)
    for layer, cache in zip(ours.layers, caches, strict=True):
        if layer.state_bytes:
            assert layer.state_bytes == sum(x.nbytes for x in cache.cache)
        else:
            assert layer.bf16_token_bytes * host.KVCache.step == cache.nbytes


TOKENS = 300


def tiny_with(**more):
    """A small model, and the planner's view of it."""
    config = {
        **{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 64},
        **{"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        **{"sliding_window": 64},
    } | more
    theirs = llama.Model(llama.ModelArgs.from_dict(config))
    theirs.set_dtype(mx.bfloat16)
    return models.read("tiny", config), theirs


@pytest.fixture
def tiny():
    return tiny_with()


def filled(caches):
    """Bytes that these caches take with ``TOKENS`` tokens."""
    keys, values = (mx.random.normal((1, 2, TOKENS, 64)).astype(mx.bfloat16) for _ in range(2))
    for cache in caches:
        cache.update_and_fetch(keys, values)
    return sum(cache.nbytes for cache in caches)


def test_bf16_takes_the_planned_bytes(tiny):
    ours, theirs = tiny
    planned = MlxCache(ours, Scheme("bf16")).nbytes(TOKENS)
    assert planned == filled(host.make_prompt_cache(theirs))


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_lm_s_quantised_caches_take_the_planned_bytes(tiny, bits):
    ours, theirs = tiny
    caches = [host.QuantizedKVCache(group_size=64, bits=bits) for _ in theirs.layers]
    assert MlxCache(ours, Scheme("", mlx_bits=bits)).nbytes(TOKENS) == filled(caches)


def test_pages_within_a_budget_take_the_planned_bytes_to_the_block(tiny):
    ours, theirs = tiny
    planned = MlxCache(ours, TQ4)
    blocks = -(-TOKENS // 16)
    budget = planned.nbytes(16 * blocks) - 3 * TQ4.tail_bytes(ours.layers[0])
    pools = CachePools(theirs, TQ4.config, max_bytes=budget)
    caches = pools.make_prompt_cache()
    assert filled(caches) == planned.nbytes(TOKENS)
    assert (pools.max_blocks, pools.nbytes) == (blocks, budget)


def test_windows_take_the_planned_bytes_at_most():
    ours, theirs = tiny_with(layer_types=["sliding_attention"] * 2 + ["full_attention"])
    caches = CachePools(theirs, TQ4.config).make_prompt_cache()
    filled(caches)
    most = 0
    for _ in range(40):
        step = mx.random.normal((1, 2, 1, 64)).astype(mx.bfloat16)
        for cache in caches:
            cache.update_and_fetch(step, step)
        most = max(most, sum(cache.nbytes for cache in caches[:2]))
    windows = replace(ours, layers=ours.layers[:2])
    assert MlxCache(windows, TQ4).nbytes(10) < MlxCache(windows, TQ4).nbytes(TOKENS) == most
    assert MlxCache(windows, TQ4).nbytes(TOKENS) == MlxCache(windows, TQ4).nbytes(1 << 20)
