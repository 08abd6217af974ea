"""What the planner knows of a model, read from its Hugging Face ``config.json``.

Layers are described as mlx_lm's model classes build them: what each keeps of a sequence, and how
many elements its weights have. Vision and audio towers are left out, as mlx_lm leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .deepseek import deepseek
from .fields import Fields
from .gemma4 import gemma4
from .layers import Layer, Model
from .plain import Family, plain
from .weights import Weights, linear, vector

DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        **{"vocab_size": 262208, "sliding_window": 4096, "tie_word_embeddings": True},
        "max_position_embeddings": 131072,
    },
    "gemma4_text": {"tie_word_embeddings": True},
}
"""What configs of these types leave out."""

_DELTA_NET = Family(qk_norm=True, gated=True, interval=4, other="linear_attention")
_LLAMA = Family()
FAMILIES: dict[str, Family | Callable[[Fields], tuple[list[Layer], Weights]]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Family(qkv_bias=True, o_bias=False),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "gemma3_text": Family(qk_norm=True, norms=4, interval=6),
    "gemma4_text": gemma4,
    "gpt_oss": Family(qkv_bias=True, o_bias=True, interval=2),
    "qwen3_next": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
    "deepseek_v3": deepseek,
}
"""Model types that are known; ``text_config`` of multimodal ones."""


def read(name: str, config: Mapping[str, Any]) -> Model:
    """Describe the model of a ``config.json``.

    Raises:
        ValueError: its ``model_type`` is not known, or a number is missing or makes no sense.
    """
    text, merged = config.get("text_config"), config
    if isinstance(text, Mapping):
        merged = {"tie_word_embeddings": config.get("tie_word_embeddings"), **text}
        kind = text.get("model_type") or f"{config.get('model_type')}_text"
    else:
        kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{name}: model_type {kind!r} is not known, allowed are {', '.join(FAMILIES)}"
        )
    c = Fields(name, merged, DEFAULTS.get(kind, {}))
    family = FAMILIES[kind]
    layers, weights = plain(c, family, kind) if isinstance(family, Family) else family(c)
    if not any(layer.bf16_token_bytes for layer in layers):
        raise ValueError(f"{name}: its config has no attention layers")
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ValueError(f"{name}: its config gives {quantization!r} for quantization")
    limit = c.number("max_position_embeddings", 0) or None
    return Model(name, tuple(layers), weights + _embeddings(c), limit, quantization)


def _embeddings(c: Fields) -> Weights:
    """Embeddings, output projection and the last norm."""
    hidden, vocabulary = c.number("hidden_size"), c.number("vocab_size")
    table = linear(hidden, vocabulary)
    if not c.flag("tie_word_embeddings"):
        table += linear(hidden, vocabulary).as_table()
    return table + vector(hidden)
