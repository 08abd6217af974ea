"""Which layers are compressed; the others keep mlx_lm's own cache, and the model runs."""

import mlx.core as mx
import mlx_lm.models.cache as host
import mlx_lm.models.llama as llama_module
import pytest
from models import build, llama, tokens

from vllm_metal_tq import TurboQuantKVCache, make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm import hook, report
from vllm_metal_tq.integrations.mlx_lm.fetched import FetchedKVCache, SharedKVCache
from vllm_metal_tq.integrations.mlx_lm.parts import compressed
from vllm_metal_tq.integrations.mlx_lm.probe import INSIDE, TWICE, WINDOW, attention


def run(model, count, layers):
    theirs = [type(cache) for cache in host.make_prompt_cache(model)]
    cache = make_prompt_cache(model)
    for chunk in (tokens(20), tokens(1), tokens(3)):
        assert mx.isfinite(model(chunk, cache=cache)).all()
    held = report(cache)
    assert (held.layers_compressed, held.layers) == (count, layers)
    for ours, kind in zip(cache, theirs, strict=True):
        assert type(ours) is kind or compressed(ours) is ours
    return cache


def test_layers_with_a_sliding_window_get_caches_that_know_it():
    pattern = ["sliding_attention", "full_attention"] * 2
    model = build("llama", head_dim=64, num_hidden_layers=4, layer_types=pattern, sliding_window=8)
    cache = run(model, 4, 4)
    assert [c.sequences.window for c in cache] == [8, 0, 8, 0]
    assert [found.window for found in attention(model)] == [8, 0, 8, 0]


def test_a_window_beside_first_tokens_keeps_its_cache():
    model = Sinks(llama().args)
    hook.install(model)
    assert attention(model) == [WINDOW] * 3


class Sinks(llama_module.Model):
    """A model whose windows keep their first tokens."""

    def make_cache(self):
        return [host.RotatingKVCache(max_size=8, keep=4) for _ in self.layers]


def test_attention_sinks_reach_our_attention():
    model = build(
        "gpt_oss",
        head_dim=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
        rope_scaling=None,
    )
    for layer in model.layers:
        layer.self_attn.sinks = mx.array([1.0, 2.0, -1.0, 0.5])
    chunks = [tokens(20), tokens(1)]
    dense = host.make_prompt_cache(model)
    exact = [model(c, cache=dense) for c in chunks][1]
    cache = run(model, 2, 2)
    cache = make_prompt_cache(model)
    ours = [model(c, cache=cache) for c in chunks][1]
    for layer in model.layers:
        layer.self_attn.sinks = mx.zeros((4,)) - 100
    no_sinks = host.make_prompt_cache(model)
    without = [model(c, cache=no_sinks) for c in chunks][1]
    assert mx.abs(ours - exact).max() < 0.2 * mx.abs(without - exact).max()


def test_latent_attention_keeps_its_cache():
    model = build(
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
    run(model, 0, 3)


def test_state_space_layers_keep_their_cache():
    model = build(
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
    run(model, 1, 4)


@pytest.mark.skipif(
    not hasattr(host.KVCache, "keys_and_values"),
    reason="before mlx_lm 0.32 layers read a cache's state, and it is kept as it is",
)
def test_layers_that_share_keys_share_a_compressed_cache():
    text = {
        "model_type": "gemma3n_text",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 97,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 97,
        "sliding_window": 8,
        "max_position_embeddings": 512,
        "rope_local_base_freq": 1e4,
        "rope_theta": 1e6,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": None,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": None,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "rope_scaling": None,
        "slide_window": 8,
        "query_pre_attn_scalar": 64.0,
    }
    cache = run(build("gemma3n", text_config=text), 2, 2)
    assert list(map(type, cache)) == [SharedKVCache] * 2


def test_a_layer_whose_keys_another_reads_shares_its_cache():
    # Gemma 4 E2B and E4B hand them on without the cache.
    sizes = {"head_dim": 64, "global_head_dim": 64, "num_key_value_heads": 1, "sliding_window": 8}
    few = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 97}

    def gemma(shared):
        kinds = {"sliding_window_pattern": 2, "num_kv_shared_layers": shared}
        return build("gemma4_text", num_hidden_layers=6, **sizes, **few, **kinds)

    def full(model, count):
        return list(map(type, run(model, 2 * count, 2 * count)[1::2]))

    assert full(gemma(0), 3) == [TurboQuantKVCache] * 3
    assert full(gemma(2), 2) == [TurboQuantKVCache, SharedKVCache]


def test_keys_that_are_changed_after_the_cache_are_handed_out_whole(monkeypatch):
    # The past would miss the change.
    def scaled(self, x, mask=None, cache=None):
        q, k, v = (
            project(x).reshape(1, x.shape[1], -1, 64).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = cache.update_and_fetch(k, v)
        out = llama_module.scaled_dot_product_attention(
            q, 2 * k, v, cache=cache, scale=self.scale, mask=mask
        )
        return self.o_proj(out.swapaxes(1, 2).flatten(2))

    monkeypatch.setattr(llama_module.Attention, "__call__", scaled)
    assert list(map(type, run(llama(), 3, 3))) == [FetchedKVCache] * 3


def attending(monkeypatch, fetch):
    """A llama whose attention goes through ``fetch`` for keys and values of all tokens."""

    def attend(self, x, mask=None, cache=None):
        q, k, v = (
            project(x).reshape(1, x.shape[1], -1, 64).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = fetch(cache, k, v)
        out = llama_module.scaled_dot_product_attention(
            q, k, v, cache=cache, scale=self.scale, mask=mask
        )
        return self.o_proj(out.swapaxes(1, 2).flatten(2))

    monkeypatch.setattr(llama_module.Attention, "__call__", attend)
    return llama()


def test_a_cache_that_is_written_twice_a_step_stays(monkeypatch):
    def twice(cache, k, v):
        cache.update_and_fetch(k, v)
        return cache.update_and_fetch(k, v)

    model = attending(monkeypatch, twice)
    run(model, 0, 3)
    assert attention(model) == [TWICE] * 3


def test_a_cache_whose_insides_a_model_reads_or_writes_stays(monkeypatch):
    def read(cache, k, v):
        cache.update_and_fetch(k, v)
        return cache.keys[:, :, : cache.offset], cache.values[:, :, : cache.offset]

    model = attending(monkeypatch, read)
    run(model, 0, 3)
    assert attention(model) == [INSIDE] * 3

    def write(cache, k, v):
        fetched = cache.update_and_fetch(k, v)
        cache.keys = mx.depends(cache.keys, k)
        return fetched

    model = attending(monkeypatch, write)
    run(model, 0, 3)
    assert attention(model) == [INSIDE] * 3


def test_prompts_and_single_tokens_may_be_attended_to_in_different_ways(monkeypatch):
    def changed_in_prompts(cache, k, v):
        length = k.shape[2]
        k, v = cache.update_and_fetch(k, v)
        return (k, v) if length == 1 else (1 * k, v)

    model = attending(monkeypatch, changed_in_prompts)
    assert list(map(type, run(model, 3, 3))) == [FetchedKVCache] * 3
