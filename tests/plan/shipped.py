"""mlx_lm's own model of each shipped configuration; its weights are never computed."""

import copy

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from vllm_metal_tq.plan.sources import shipped

NAMES = list(shipped())
UNCHANGED = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}  # what says nothing of sizes
_OTHERS = ("vision", "audio", "multi_modal", "embed_vision", "embed_audio")


def mlx_lm_model(config):
    """The language model that mlx_lm makes of a config."""
    config = copy.deepcopy(config)
    config.pop("quantization_config", None)
    text = config.get("text_config", config)
    dim = text["hidden_size"] // text["num_attention_heads"]
    text |= {name: value for name, value in UNCHANGED.items() if name not in text}
    text.setdefault("head_dim", dim)
    config["vocab_size"] = text["vocab_size"]
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(mx.bfloat16)
    return model


def weights(model):
    """Its weights, without towers for other media and without a copy of tied embeddings."""
    text = getattr(model, "language_model", model)
    # mlx_lm makes Gemma 3 with an output projection, and drops it when weights are loaded.
    others = (*_OTHERS, "lm_head") if text.model_type == "gemma3_text" else _OTHERS
    found = tree_flatten(model.parameters())
    return [x for name, x in found if not any(other in name for other in others)]
