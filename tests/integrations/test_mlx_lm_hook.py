import importlib.util
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.base as base
import mlx_lm.models.cache as host
import mlx_lm.models.llama as llama_module
import pytest
from models import build, llama, tokens

from vllm_metal_tq import TurboQuantKVCache, make_prompt_cache
from vllm_metal_tq.integrations import mlx_lm_hook as hook
from vllm_metal_tq.integrations.mlx_lm import report


@pytest.fixture(autouse=True)
def unhooked():
    hook.uninstall(TurboQuantKVCache)
    yield
    hook.uninstall(TurboQuantKVCache)


def holders():
    """Loaded modules of mlx_lm that hold the attention function, with what they hold."""
    name = "scaled_dot_product_attention"
    modules = [m for n, m in sys.modules.items() if n.startswith("mlx_lm.models.")]
    return {m.__name__: vars(m)[name] for m in modules if name in vars(m)}


def test_uninstalled_is_as_if_never_installed():
    before = holders()
    make_prompt_cache(llama())
    assert llama_module.scaled_dot_product_attention is not hook.dense_attention
    hook.uninstall(TurboQuantKVCache)
    assert holders() == before
    assert set(before.values()) == {hook.dense_attention}
    assert not hasattr(host, "TurboQuantKVCache")


def test_installing_twice_changes_nothing():
    model = llama()
    make_prompt_cache(model)
    once = holders()
    make_prompt_cache(model)
    assert holders() == once


def test_modules_imported_later_are_reached_and_put_back():
    make_prompt_cache(llama())
    sys.modules.pop("mlx_lm.models.qwen2", None)
    model = build("qwen2", head_dim=64, hidden_size=256)
    assert type(model).__module__ in holders()
    assert report(make_prompt_cache(model)).layers_compressed == 3
    hook.uninstall(TurboQuantKVCache)
    assert set(holders().values()) == {hook.dense_attention}


def test_a_model_from_a_file_of_its_own_is_reached(tmp_path):
    # As mlx_lm loads a config's model_file: executed, but no entry of sys.modules.
    source = (tmp_path / "custom.py").resolve()
    text = Path(llama_module.__file__).read_text(encoding="utf-8")
    text = text.replace("from .", "from mlx_lm.models.")
    source.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("custom_model", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_model"] = module  # dataclasses look their module up while it executes
    spec.loader.exec_module(module)
    del sys.modules["custom_model"]
    model = module.Model(module.ModelArgs.from_dict(vars(llama().args)))
    cache = make_prompt_cache(model)
    model(tokens(20), cache=cache)
    mx.eval(model(tokens(1), cache=cache))
    assert report(cache).layers_compressed == 3
    hook.uninstall(TurboQuantKVCache)
    assert module.scaled_dot_product_attention is hook.dense_attention


@pytest.mark.parametrize(
    "make",
    [
        lambda model: host.make_prompt_cache(model),
        lambda model: [host.QuantizedKVCache(group_size=32, bits=4) for _ in model.layers],
        lambda model: [host.RotatingKVCache(max_size=8) for _ in model.layers],
        lambda model: None,
    ],
)
def test_other_caches_are_left_exactly_as_they_were(make):
    model = llama()
    plain = [model(chunk, cache=cache) for cache in [make(model)] for chunk in map(tokens, (20, 1))]
    make_prompt_cache(model)
    hooked = [
        model(chunk, cache=cache) for cache in [make(model)] for chunk in map(tokens, (20, 1))
    ]
    assert all(map(mx.array_equal, plain, hooked))


def test_base_serves_modules_that_come_later():
    make_prompt_cache(llama())
    assert base.scaled_dot_product_attention is not hook.dense_attention


class TestOtherKindsOfAttention:
    """Which layers are compressed; the others keep mlx_lm's own cache, and the model runs."""

    def run(self, model, compressed, layers):
        theirs = [type(cache) for cache in host.make_prompt_cache(model)]
        cache = make_prompt_cache(model)
        for chunk in (tokens(20), tokens(1), tokens(3)):
            assert mx.isfinite(model(chunk, cache=cache)).all()
        held = report(cache)
        assert (held.layers_compressed, held.layers) == (compressed, layers)
        for ours, kind in zip(cache, theirs, strict=True):
            assert type(ours) in (kind, TurboQuantKVCache)
        return cache

    def test_sliding_window_layers_keep_their_cache(self):
        pattern = ["sliding_attention", "full_attention"] * 2
        model = build(
            "llama", head_dim=64, num_hidden_layers=4, layer_types=pattern, sliding_window=8
        )
        cache = self.run(model, 2, 4)
        assert [type(c).__name__ for c in cache] == ["RotatingKVCache", "TurboQuantKVCache"] * 2

    def test_attention_sinks_reach_our_attention(self):
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
        cache = self.run(model, 1, 2)
        cache = make_prompt_cache(model)
        ours = [model(c, cache=cache) for c in chunks][1]
        for layer in model.layers:
            layer.self_attn.sinks = mx.zeros((4,)) - 100
        no_sinks = host.make_prompt_cache(model)
        without = [model(c, cache=no_sinks) for c in chunks][1]
        assert mx.abs(ours - exact).max() < 0.2 * mx.abs(without - exact).max()

    def test_latent_attention_keeps_its_cache(self):
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
        self.run(model, 0, 3)

    def test_state_space_layers_keep_their_cache(self):
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
        self.run(model, 1, 4)

    def test_layers_that_share_keys_keep_their_cache(self):
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
        self.run(build("gemma3n", text_config=text), 0, 2)
