"""Modules of mlx_lm whose attention is that of a kind: small models of them."""

from __future__ import annotations

from typing import Any

from kinds import (
    DELTA_NET,
    EXPERTS,
    FEW_INPUTS,
    HEADS,
    LATENTS,
    LOCAL_EXPERTS,
    MROPE,
    MULTIPLIERS,
    alternating,
)

LAYERS = {"layer_types": alternating("sliding_attention", "full_attention", 2)}
WINDOWS = HEADS | LAYERS | {"num_hidden_layers": 4, "sliding_window": 16}
ROPES = {
    "rope_parameters": {
        kind: {"rope_theta": 1e4, "rope_type": "default"}
        for kind in ("sliding_attention", "full_attention")
    }
}
MOE = EXPERTS | {
    **{"num_local_experts": 2, "num_shared_experts": 1, "n_shared_experts": 1},
    **{"n_routed_experts": 2, "first_k_dense_replace": 9, "routed_scaling_factor": 1.0},
    **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "attention_bias": False},
    **{"tie_word_embeddings": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
}
MLA = LATENTS | {"q_lora_rank": 32}
HYBRID = {"num_hidden_layers": 4, "layer_group_size": 2, "group_norm_size": 1}
CONVS = {
    **{"num_hidden_layers": 4, "layer_types": alternating("conv", "full_attention", 2)},
    **{"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3},
}
NTK = {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}}
TEXT = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
KDA = {
    "linear_attn_config": {
        **{"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 2},
        **{"head_dim": 32, "short_conv_kernel_size": 4},
    }
}


def text(model_type: str, *fields: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": model_type} if model_type else {}
    for more in fields:
        config |= more
    return {"text_config": config}


ALIKE: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "Klear": MOE,
        "apertus": HEADS | TEXT | {"post_norm": False, "qk_norm": True},
        "bailing_moe": MOE,
        "dbrx": {"d_model": 256, "n_layers": 3, "n_heads": 4}
        | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 2}}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
        "deepseek": {"hidden_size": 256},
        "dots1": MOE | HEADS,
        "ernie4_5": HEADS | TEXT | {"use_bias": False},
        "ernie4_5_moe": {"hidden_size": 256, "use_bias": False, "tie_word_embeddings": False}
        | {"moe_num_experts": 2, "moe_k": 2, "moe_intermediate_size": 32},
        "exaone": {"hidden_size": 256, "num_layers": 3, "layer_norm_epsilon": 1e-5},
        "glm": HEADS,
        "glm4_moe": MOE
        | HEADS
        | {"rope_scaling": None, "use_qk_norm": True, "partial_rotary_factor": 0.5},
        "gpt_bigcode": {"n_embd": 64, "n_layer": 3, "n_inner": 96, "n_head": 4}
        | {"n_positions": 4096, "layer_norm_epsilon": 1e-5},
        "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096, "rotary_dim": 8},
        "granitemoe": MULTIPLIERS | LOCAL_EXPERTS,
        "helium": HEADS | TEXT,
        "hunyuan": MOE
        | NTK
        | {"hidden_size": 256, "num_hidden_layers": 4, "moe_topk": 2, "num_shared_expert": 1}
        | {"use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": True, "cla_share_factor": 2},
        "hunyuan_v1_dense": HEADS | NTK,
        "internlm2": {},
        "internlm3": HEADS,
        "lille-130m": {"block_size": 4096, "layer_norm_eps": 1e-5, "n_embd": 64, "n_head": 4}
        | {"n_kv_heads": 2, "n_layer": 3},
        "llama4_text": HEADS
        | TEXT
        | {"intermediate_size_mlp": 96, "no_rope_layers": [1, 0, 1], "use_qk_norm": True},
        "mimo": {},
        "minicpm": {"dim_model_base": 64, "scale_depth": 1.0, "scale_emb": 1.0},
        "minimax": MOE | HEADS | {"shared_intermediate_size": 32, "rotary_dim": 32},
        "nanochat": {"num_key_value_heads": 4},
        "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
        "nemotron-nas": {"hidden_size": 256}
        | {
            "block_configs": [
                {"attention": attention, "ffn": {"ffn_mult": 1.0}}
                for attention in ({"n_heads_in_group": 2}, {"no_op": True}, {"n_heads_in_group": 4})
            ]
        },
        "olmoe": {"num_experts": 2, "num_experts_per_tok": 2},
        "phi": {},
        "phimoe": LOCAL_EXPERTS
        | {
            "rope_scaling": {
                **{"short_factor": [1.0], "long_factor": [1.0], "short_mscale": 1.0},
                **{"long_mscale": 1.0, "original_max_position_embeddings": 4096},
            }
        },
        "phixtral": LOCAL_EXPERTS
        | {"num_vocab": 97, "model_dim": 64, "num_heads": 4, "num_layers": 3, "rotary_dim": 16},
        "pixtral": text("llama", HEADS),
        "qwen": {"kv_channels": 64, "hidden_size": 256},
        "qwen2_vl": text("qwen2"),
        "qwen3_vl": text("qwen3", HEADS, {"tie_word_embeddings": True}),
        "qwen3_vl_moe": text("qwen3_moe", HEADS, MOE),
        "seed_oss": HEADS,
        "solar_open": MOE | HEADS | {"partial_rotary_factor": 1.0},
        "starcoder2": {},
        "telechat3": {},
    },
    "llama with windows": {
        "afmoe": MOE | WINDOWS | {"num_dense_layers": 9},
        "exaone_moe": MOE | WINDOWS | {"is_moe_layer": [False] * 4},
        "gemma3": text("gemma3_text", WINDOWS, {"sliding_window_pattern": 2}),
        "gemma4": text(
            "",
            FEW_INPUTS,
            {"head_dim": 32, "global_head_dim": 64, "num_key_value_heads": 1},
            {"sliding_window": 16, "num_hidden_layers": 4, "sliding_window_pattern": 2},
            {"num_kv_shared_layers": 0},
        ),
        "laguna": MOE
        | WINDOWS
        | ROPES
        | {"num_attention_heads_per_layer": [4, 2, 4, 4], "mlp_layer_types": ["dense"] * 4}
        | {"shared_expert_intermediate_size": 32},
        "mellum": MOE | WINDOWS | ROPES,
        "muse_glimmer": WINDOWS | {"layer_rope_theta": [1e4] * 4},
        "plamo3": WINDOWS | {"sliding_window_pattern": 2, "window_size": 16},
        "spark2_5": WINDOWS | ROPES,
    },
    "qwen3_next": {
        "bailing_moe_linear": MOE | HEADS | HYBRID,
        "lfm2-vl": text(
            "",
            CONVS,
            {"block_dim": 64, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0},
            {"block_ff_dim": 96, "block_auto_adjust_ff_dim": False, "head_dim": 16},
        ),
        "lfm2_moe": MOE | CONVS | {"use_expert_bias": True, "num_dense_layers": 9},
        "olmo_hybrid": DELTA_NET
        | {"num_hidden_layers": 4, "linear_allow_neg_eigval": True, "hidden_size": 256}
        | {"tie_word_embeddings": False, "attention_bias": False},
        "qwen3_5_moe": text(
            "",
            HEADS | DELTA_NET | EXPERTS,
            {"num_hidden_layers": 4, "tie_word_embeddings": False},
            {"shared_expert_intermediate_size": 32},
            {"rope_parameters": MROPE | {"partial_rotary_factor": 0.25}},
        ),
    },
    "mamba2": {
        "mamba": {"state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
        | {"time_step_rank": 4},
        "rwkv7": {"norm_eps": 1e-5, "head_dim": 32, "a_low_rank_dim": 8, "v_low_rank_dim": 8}
        | {"gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    },
    "deepseek_v3": {
        "glm4_moe_lite": MOE | MLA,
        "kimi_k25": text("deepseek_v3", LATENTS),
        "kimi_vl": text("deepseek_v3", LATENTS),
        "mistral4": MOE
        | MLA
        | {
            "rope_parameters": {
                **{"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "type": "default"},
                **{"original_max_position_embeddings": 32},
            }
        },
    },
    "kimi_linear": {
        "bailing_hybrid": MOE | MLA | HYBRID | {"head_dim": 32},
        "bailing_moe_v3": MOE | MLA | {"num_hidden_layers": 4},
        "kimi_k3": text(
            "",
            MOE,
            MLA,
            KDA,
            {"num_hidden_layers": 4, "head_dim": 32, "model_max_length": 4096},
            {"num_experts_per_token": 2},
        ),
    },
    "longcat_flash": {
        "longcat_flash_ngram": MLA
        | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2, "num_layers": 2}
        | {"n_routed_experts": 2, "zero_expert_num": 1, "routed_scaling_factor": 1.0}
        | {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    },
    "deepseek_v32": {
        "glm_moe_dsa": MOE
        | MLA
        | {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 256, "moe_layer_freq": 1}
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    },
    "deepseek_v2": {"youtu_llm": MLA},
}
"""Of a kind, the modules that attend like it: the fields of a small model of each."""

NOT_RUN = {
    "bitnet": "its weights need a Metal kernel; its attention is llama's",
    "muse_spark": "its norms need a Metal kernel; its attention is that of llama with windows",
    "olmo": "needs the package ai2-olmo, and mlx_lm 0.32.2 runs no prompt through it",
    "prism_hadamard_qwen35": "its weights come packed; its attention is qwen3_5's",
}
"""Modules that cannot run here, and why."""
