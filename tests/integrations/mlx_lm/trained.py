"""Models of the kinds, changed to attend as trained ones do."""

import mlx.core as mx
import mlx.nn as nn
from kinds import Kind
from models import build

UNTRAINED = "conv_k", "conv_v", "lm_head"  # weights that may be zeros at first
SHARP = 3  # times the scale of logits, where no norms make queries and keys long


def trained(kind: Kind) -> nn.Module:
    """A kind's model with attention as sharp as in trained ones.

    With random weights it hardly tells positions apart.
    """
    model = build(kind.model_type, **kind.fields)
    for _, module in model.named_modules():
        normed = any(name in module for name in ("q_norm", "q_layernorm", "q_weight"))
        for name in ("scale", "sm_scale"):
            scale = getattr(module, name, None)
            if isinstance(scale, float) and not isinstance(module, nn.RoPE):
                # Gemma 4 has the weights of a norm in place of a scale.
                scale = module.head_dim**-0.5 if scale == 1.0 else scale
                setattr(module, name, scale if normed else SHARP * scale)
        if "sinks" in module:
            module.sinks = mx.arange(module.sinks.size) + 2.0
        for name in UNTRAINED:
            if isinstance(module.get(name), mx.array):
                module[name] = mx.random.normal(module[name].shape, scale=0.5, key=mx.random.key(0))
        for name in ("quant_key_scale", "quant_value_scale"):
            if name in module:  # steps of 1 would round small keys and values to zero
                module[name] = mx.array(0.01)
    if hasattr(model, "_dummy_tokenizer_ids"):  # ids of a vocabulary that is larger than ours
        model._dummy_tokenizer_ids = mx.array([], mx.uint32)
    return model
