"""Kinds of attention in mlx_lm: a tiny model of each, and what becomes of each of its caches."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from vllm_metal_tq.integrations.mlx_lm.probe import (
    CHUNKS,
    INDEX,
    INSIDE,
    LATENT,
    STATE,
    Reader,
)
from vllm_metal_tq.integrations.mlx_lm.probe import WINDOW as SLIDING

COMPRESSED, SHARED, FETCHED = OURS = [reader.value for reader in Reader]
WINDOW = 48  # tokens: more than the tail, and fewer than test_matrix.py asks for

HEADS = {"head_dim": 64}
# All experts are taken: which are would hang on rounding.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 1024,
}
SHARED_BY_METHOD = "0.32"  # before, layers read a cache's state, and it is kept as it is
NORMED_TWICE = 1024  # in place of 64: what norms of 1 + 1 make of queries and keys
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
DELTA_NET = {
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32},
    **{"linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "full_attention_interval": 2},
}
MAMBA2 = {
    **{"conv_kernel": 4, "n_groups": 1, "layer_norm_epsilon": 1e-5, "use_bias": False},
    **{"use_conv_bias": True, "time_step_limit": (0.001, 100.0)},
}
MULTIPLIERS = {
    **{"logits_scaling": 1.0, "attention_multiplier": 0.25, "embedding_multiplier": 1.0},
    **{"residual_multiplier": 1.0, "attention_bias": False, "mlp_bias": False},
}
LATENTS = {
    **{"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32},
    **{"v_head_dim": 32, "num_key_value_heads": 4, "moe_intermediate_size": 32},
    **{"n_routed_experts": None, "n_shared_experts": None, "first_k_dense_replace": 3},
}
EXPANDED = LATENTS | {"rope_scaling": YARN | {"type": "yarn", "mscale_all_dim": 0}}
GEMMA3N = {
    **{"vocab_size_per_layer_input": 97, "rope_local_base_freq": 1e4, "sliding_window": WINDOW},
    **{"final_logit_softcapping": 30.0, "activation_sparsity_pattern": None},
    **{"hidden_size_per_layer_input": 16, "altup_num_inputs": 2, "altup_coef_clip": None},
    **{"altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8},
    **{"rope_scaling": None, "query_pre_attn_scalar": 64.0, "num_kv_shared_layers": 2},
    **{"layer_types": ["sliding_attention", "full_attention"] * 2, "slide_window": WINDOW},
}
FEW_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 97}


@dataclass(frozen=True)
class Kind:
    """A kind of attention.

    Attributes:
        model_type: module of ``mlx_lm.models``.
        what: its attention, in words.
        caches: what becomes of each of the model's caches.
        fields: of the model's arguments, over small defaults.
        name: where several kinds have the same ``model_type``.
        since: the mlx_lm from which it is so.
    """

    model_type: str
    what: str
    caches: list[str]
    fields: dict[str, Any]
    name: str = ""
    since: str = "0.31"

    def __str__(self) -> str:
        return self.name or self.model_type

    @property
    def is_here(self) -> bool:
        """Whether the installed mlx_lm has it so."""
        return Version(version("mlx-lm")) >= Version(self.since)

    @property
    def compressed(self) -> list[bool]:
        """Which of the caches are."""
        return [cache in OURS for cache in self.caches]

    @property
    def rings(self) -> bool:
        """Whether some of them have a window."""
        fields = self.fields | self.fields.get("text_config", {})
        return WINDOW in [x for x in fields.values() if x.__hash__] and SLIDING not in self.caches


def alternating(first: str, second: str, pairs: int = 1) -> list[str]:
    return [first, second] * pairs


def full(layers: int = 3) -> list[str]:
    return [COMPRESSED] * layers


KINDS = [
    Kind("llama", "grouped queries", full(), HEADS),
    Kind(
        "llama",
        "Llama 3's scaled RoPE",
        full(),
        HEADS | {"rope_scaling": LLAMA3, "max_position_embeddings": 8192},
        "llama with Llama 3's RoPE",
    ),
    Kind("llama", "YaRN", full(), HEADS | {"rope_scaling": YARN}, "llama with YaRN"),
    Kind("llama", "M-RoPE, of text", full(), HEADS | {"rope_scaling": MROPE}, "llama with M-RoPE"),
    Kind(
        "llama",
        "full attention beside sliding windows",
        full(4),
        HEADS
        | {"num_hidden_layers": 4, "sliding_window": WINDOW}
        | {"layer_types": alternating("sliding_attention", "full_attention", 2)},
        "llama with windows",
    ),
    Kind(
        "llama4",
        "layers without RoPE and with a temperature, beside attention within chunks",
        [CHUNKS] * 3 + [COMPRESSED],
        {
            "text_config": HEADS
            | {"num_hidden_layers": 4, "attention_chunk_size": 64, "attention_bias": False}
            | {"num_local_experts": 1, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
            | {"intermediate_size_mlp": 96, "rope_scaling": None, "use_qk_norm": True}
            | {"floor_scale": 16}
        },
        since="0.32",  # before, mlx_lm's own cache breaks at the end of a chunk
    ),
    Kind(
        "mistral3",
        "as llama, in a model for images",
        full(),
        {"text_config": HEADS | {"model_type": "llama"}},
    ),
    Kind(
        "ministral3",
        "queries scaled by their position",
        full(),
        HEADS
        | {
            "rope_parameters": YARN
            | {
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    Kind("mixtral", "experts", full(), LOCAL_EXPERTS),
    Kind("qwen2", "biases", full(), {}),
    Kind("qwen2_moe", "biases, experts", full(), EXPERTS | {"shared_expert_intermediate_size": 32}),
    Kind("qwen3", "norms of queries and keys", full(), HEADS | {"tie_word_embeddings": True}),
    Kind(
        "qwen3_moe",
        "norms of queries and keys, experts",
        full(),
        HEADS
        | EXPERTS
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        | {"tie_word_embeddings": False},
    ),
    Kind(
        "qwen3_next",
        "gated attention with partial RoPE beside linear attention",
        alternating(STATE, COMPRESSED, 2),
        HEADS
        | DELTA_NET
        | EXPERTS
        | {"num_hidden_layers": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}
        | {"shared_expert_intermediate_size": 32, "partial_rotary_factor": 0.25},
    ),
    Kind(
        "qwen3_5",
        "the same with M-RoPE",
        alternating(STATE, COMPRESSED, 2),
        HEADS
        | DELTA_NET
        | {"num_hidden_layers": 4, "tie_word_embeddings": False}
        | {"rope_parameters": MROPE | {"partial_rotary_factor": 0.25}},
    ),
    Kind("gemma", "one KV head", full(), HEADS | {"num_key_value_heads": 1}),
    Kind(
        "gemma2",
        "soft-capped logits",
        [FETCHED] * 3,
        HEADS | {"query_pre_attn_scalar": NORMED_TWICE, "attn_logit_softcapping": 5.0},
    ),
    Kind(
        "gemma3_text",
        "norms of queries and keys, full attention beside sliding windows",
        full(4),
        HEADS
        | {"num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2}
        | {"query_pre_attn_scalar": NORMED_TWICE},
    ),
    Kind(
        "gemma3n",
        "full attention whose keys other layers read, beside sliding windows",
        [SHARED, SHARED],
        {"text_config": HEADS | GEMMA3N | {"num_hidden_layers": 4}},
        since=SHARED_BY_METHOD,
    ),
    Kind(
        "gemma4_text",
        "larger heads in full attention, which has proportional RoPE, beside sliding windows",
        full(4),
        {"head_dim": 32, "global_head_dim": 64, "num_key_value_heads": 1, "sliding_window": WINDOW}
        | {"num_hidden_layers": 4, "sliding_window_pattern": 2, "num_kv_shared_layers": 0}
        | FEW_INPUTS,
    ),
    Kind(
        "gemma4_text",
        "the same, keys read by other layers",
        [COMPRESSED, COMPRESSED, SHARED, SHARED],
        {"head_dim": 32, "global_head_dim": 64, "num_key_value_heads": 1, "sliding_window": WINDOW}
        | {"num_hidden_layers": 6, "sliding_window_pattern": 2, "num_kv_shared_layers": 2}
        | FEW_INPUTS,
        "gemma4_text with shared keys",
    ),
    Kind("phi3", "partial RoPE, one projection", full(), {"partial_rotary_factor": 0.5}),
    Kind(
        "gpt_oss",
        "sinks and YaRN, full attention beside sliding windows",
        full(2),
        HEADS
        | LOCAL_EXPERTS
        | {"num_hidden_layers": 2, "sliding_window": WINDOW, "rope_scaling": YARN}
        | {"layer_types": alternating("sliding_attention", "full_attention")},
    ),
    Kind("olmo2", "norms after attention", full(), {"tie_word_embeddings": False}),
    Kind(
        "olmo3",
        "the same beside sliding windows",
        full(4),
        {"num_hidden_layers": 4, "sliding_window": WINDOW}
        | {"layer_types": alternating("sliding_attention", "full_attention", 2)},
    ),
    Kind(
        "glm4",
        "partial RoPE of adjacent pairs",
        full(),
        HEADS | {"partial_rotary_factor": 0.5, "attention_bias": True},
    ),
    Kind(
        "cohere",
        "RoPE of adjacent pairs, attention beside the MLP",
        full(),
        {"layer_norm_eps": 1e-5, "use_qk_norm": False, "logit_scale": 1.0},
    ),
    Kind(
        "cohere2",
        "the same without RoPE in full attention, beside sliding windows",
        full(4),
        HEADS
        | {"num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2}
        | {"logit_scale": 1.0, "hidden_size": 256},
    ),
    Kind("granite", "scaled residuals and logits", full(), MULTIPLIERS),
    Kind("smollm3", "layers without RoPE", full(4), {"num_hidden_layers": 4} | HEADS),
    Kind(
        "exaone4",
        "full attention without RoPE beside sliding windows",
        full(4),
        HEADS
        | {"num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": "LG"}
        | {"tie_word_embeddings": False, "rope_scaling": None},
    ),
    Kind(
        "gpt2",
        "learned positions",
        full(2),
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 4096, "n_ctx": 4096}
        | {"layer_norm_epsilon": 1e-5},
    ),
    Kind(
        "gpt_neox",
        "partial RoPE, queries, keys and values of one projection",
        full(),
        {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    ),
    Kind(
        "stablelm",
        "keys that are cast after the cache",
        [FETCHED] * 3,
        {"use_qkv_bias": False, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    ),
    Kind("plamo", "KV heads that are copied after the cache", [FETCHED] * 3, {"n_shared_head": 2}),
    Kind(
        "plamo2",
        "attention that calls MLX itself, beside state space",
        alternating(STATE, FETCHED, 2),
        {"num_hidden_layers": 4, "hidden_size_per_head": 64, "mamba_step": 2}
        | {"mamba_num_heads": 4, "mamba_d_state": 16},
    ),
    Kind(
        "phi3small",
        "blocks that are left out, by the model's own code, beside full attention",
        [FETCHED, COMPRESSED, FETCHED],
        {"hidden_size": 256, "ff_intermediate_size": 96, "gegelu_limit": 20.0}
        | {"dense_attention_every_n_layers": 2, "layer_norm_epsilon": 1e-5}
        | {"blocksparse_block_size": 32, "blocksparse_num_local_blocks": 2}
        | {"blocksparse_vert_stride": 2, "mup_attn_multiplier": 8.0},
    ),
    Kind(
        "gear",
        "soft-capped logits, beside sliding windows and convolutions",
        [SLIDING, STATE, FETCHED, FETCHED],
        HEADS
        | {"num_hidden_layers": 4, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0}
        | {"layer_types": ["sliding_attention", "conv_mixer"] + ["full_attention"] * 2},
    ),
    Kind(
        "afm7",
        "keys of the last layer that others read, who find their position in the keys' shape",
        [COMPRESSED, SHARED],
        {"hidden_dim": 256, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4}
        | {"num_kv_heads": 2},
        since=SHARED_BY_METHOD,
    ),
    Kind(
        "iquestloopcoder",
        "layers run twice, the second time beside sliding windows",
        [SHARED] * 3 + [COMPRESSED] * 3,
        HEADS | {"loop_window_size": WINDOW},
    ),
    Kind("nanbeige", "layers run twice, with keys of each time", full(6), HEADS | {"num_loops": 2}),
    Kind(
        "openelm",
        "heads that differ between layers",
        full(),
        {"head_dim": 64, "num_transformer_layers": 3, "model_dim": 64, "ffn_dim_divisor": 16}
        | {"num_query_heads": [2, 4, 4], "num_kv_heads": [1, 2, 4]}
        | {"ffn_multipliers": [1.0, 1.0, 1.0]},
    ),
    Kind(
        "talkie",
        "norms of queries and keys after RoPE",
        full(),
        {"hidden_size": 256, "num_key_value_heads": 4},
    ),
    Kind(
        "step3p5",
        "gated heads and RoPE that differ between layers, beside sliding windows",
        full(4),
        HEADS
        | {"num_hidden_layers": 4, "num_attention_groups": 2, "sliding_window": WINDOW}
        | {"layer_types": alternating("sliding_attention", "full_attention", 2)}
        | {"partial_rotary_factors": [1.0, 0.5, 1.0, 0.5], "moe_layers_enum": "9"}
        | {
            "attention_other_setting": {
                **{"num_attention_heads": 2, "num_attention_groups": 1, "head_dim": 64}
            }
        },
    ),
    Kind("deepseek_v3", "latents that are read as they are", [LATENT] * 3, LATENTS),
    Kind(
        "kimi_linear",
        "latents beside linear attention",
        alternating(STATE, LATENT, 2),
        LATENTS
        | {"num_hidden_layers": 4, "head_dim": 32, "num_experts": 2, "model_max_length": 4096}
        | {
            "linear_attn_config": {
                **{"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 2},
                **{"head_dim": 32, "short_conv_kernel_size": 4},
            }
        },
    ),
    Kind(
        "longcat_flash",
        "two of latents in one layer",
        [LATENT] * 2,
        LATENTS
        | {"q_lora_rank": 32, "attention_method": "MLA", "zero_expert_type": "identity"}
        | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2, "num_layers": 2}
        | {"n_routed_experts": 2, "zero_expert_num": 1, "routed_scaling_factor": 1.0}
        | {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_bias": False},
    ),
    Kind(
        "deepseek_v41",
        "compressed tokens and a window, in a cache of the model's own",
        ["a cache of its own (LayerCache)"] * 3,
        {"head_dim": 64, "q_lora_rank": 32, "qk_rope_head_dim": 16, "o_groups": 2}
        | {"o_lora_rank": 32, "sliding_window": 16, "hc_mult": 2, "n_routed_experts": 2}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    Kind("deepseek_v2", "latents that are expanded before the cache", full(), EXPANDED),
    Kind(
        "deepseek_v32",
        "latents of which an index chooses",
        [f"{LATENT}, {INDEX}"] * 3,
        LATENTS | {"q_lora_rank": 32, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 256},
    ),
    Kind(
        "minicpm3",
        "the same with longrope",
        full(),
        LATENTS
        | {"hidden_size": 128, "q_lora_rank": 32, "scale_depth": 1.0, "scale_emb": 1.0}
        | {"dim_model_base": 64, "rope_scaling": {"original_max_position_embeddings": 4096}},
    ),
    Kind(
        "minimax_m3_vl",
        "full attention beside attention to blocks of which an index chooses",
        alternating(COMPRESSED, f"{INSIDE}, {INDEX}", 2),
        {
            "text_config": HEADS
            | LOCAL_EXPERTS
            | {"num_hidden_layers": 4, "sparse_attention_freq": [0, 1, 0, 1]}
            | {"index_n_heads": 2, "index_head_dim": 32, "index_block_size": 16}
            | {"index_topk_blocks": 4, "intermediate_size": 32, "dense_intermediate_size": 96}
            | {"shared_intermediate_size": 32}
        },
    ),
    Kind(
        "mimo_v2_flash",
        "values smaller than keys, beside sliding windows",
        full(2),
        {"num_hidden_layers": 2, "hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 0]}
        | {"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False}
        | {"sliding_window_size": WINDOW, "moe_intermediate_size": 32, "num_experts_per_tok": 1}
        | {"n_shared_experts": None, "n_routed_experts": None, "routed_scaling_factor": None}
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
        | {"n_group": 1, "topk_group": 1, "layernorm_epsilon": 1e-5, "swa_rope_theta": 1e4}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "head_dim": 48}
        | {"v_head_dim": 32, "swa_head_dim": 48, "swa_v_head_dim": 32}
        | {"partial_rotary_factor": 0.5},
    ),
    Kind(
        "lfm2",
        "attention beside short convolutions",
        alternating(STATE, COMPRESSED, 2),
        {"num_hidden_layers": 4, "layer_types": alternating("conv", "full_attention", 2)}
        | {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64}
        | {"block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_ff_dim": 96}
        | {"block_auto_adjust_ff_dim": False, "head_dim": 16},
    ),
    Kind(
        "recurrent_gemma",
        "sliding windows beside recurrent layers",
        alternating(STATE, COMPRESSED),
        {"num_hidden_layers": 2, "attention_bias": False, "conv1d_width": 4}
        | {"logits_soft_cap": 30.0, "attention_window_size": WINDOW, "num_key_value_heads": 1}
        | {"block_types": ["recurrent", "attention"]},
    ),
    Kind(
        "mamba2",
        "state space alone",
        [STATE] * 3,
        MAMBA2
        | {"num_heads": 4, "head_dim": 32, "state_size": 16, "intermediate_size": 128}
        | {"tie_word_embeddings": False, "time_step_rank": "auto"},
    ),
    Kind(
        "jamba",
        "attention without RoPE beside state space",
        alternating(STATE, COMPRESSED, 2),
        {"num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2}
        | {"expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 1}
        | {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "num_experts_per_tok": 1},
    ),
    Kind(
        "falcon_h1",
        "attention and state space in one layer",
        full(),
        HEADS | {"mamba_d_ssm": 64, "mamba_d_head": 32, "mamba_n_heads": 2, "mamba_d_state": 16},
    ),
    Kind(
        "baichuan_m1",
        "keys that a convolution mixes: a state beside them in one layer, and sliding windows",
        full(4),
        {"num_hidden_layers": 4, "hidden_size": 256, "conv_window": 2}
        | {"sliding_window": WINDOW, "sliding_window_layers": [0, 2]},
    ),
    Kind(
        "nemotron_h",
        "attention without RoPE beside state space",
        [STATE, COMPRESSED, COMPRESSED, COMPRESSED],
        MAMBA2
        | {"hybrid_override_pattern": ["M", "*", "-", "*", "*"], "attention_bias": False}
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_proj_bias": False}
        | {"ssm_state_size": 16, "mlp_bias": False},
    ),
    Kind(
        "granitemoehybrid",
        "attention beside state space",
        [STATE, COMPRESSED, COMPRESSED],
        MULTIPLIERS
        | {"layer_types": ["mamba", "attention", "attention"], "embedding_multiplier": 0.1}
        | {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_proj_bias": False}
        | {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True}
        | {"shared_intermediate_size": 64, "mlp_bias": False},
    ),
]

NAMED = {str(kind): kind for kind in KINDS}
"""The kinds by their names."""
