"""Models whose layers are Llama's, with windows, linear attention or experts in some."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add

from .fields import Fields
from .layers import BF16, Layer
from .weights import NOTHING, Weights, linear, vector

FLOAT32 = 4  # bytes of an element


@dataclass(frozen=True)
class Family:
    """How the layers of a model type differ from Llama's.

    Attributes:
        qkv_bias: whether these have biases; None: ``attention_bias`` says.
        o_bias: likewise.
        qk_norm: whether queries and keys are normalised.
        norms: of a layer.
        gated: whether attention has an output gate as wide as its queries.
        interval: a layer in so many is full attention, where nothing lists them; 1: all.
        other: the kind of the others.
    """

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    norms: int = 2
    gated: bool = False
    interval: int = 1
    other: str = "sliding_attention"


def plain(c: Fields, family: Family, kind: str) -> tuple[list[Layer], Weights]:
    """Layers, and their weights, of a model type that differs from Llama as ``family`` says."""
    interval = c.number("full_attention_interval", family.interval, least=1)
    interval = c.number("sliding_window_pattern", interval, least=1)
    kinds = c.kinds(lambda i: family.other if (i + 1) % interval else "full_attention")
    weights = [
        (_delta_net(c) if each == "linear_attention" else _attention(c, family))
        + _feed_forward(c, index, kind)
        + vector(family.norms * c.number("hidden_size"))
        for index, each in enumerate(kinds)
    ]
    if kind == "gpt_oss":
        weights.append(vector(len(kinds) * c.number("num_attention_heads")))  # sinks
    return [layer_of(c, each) for each in kinds], reduce(add, weights, NOTHING)


def layer_of(c: Fields, kind: str) -> Layer:
    """What a layer of this kind keeps."""
    if kind == "linear_attention":
        return Layer(state_bytes=_state_bytes(c))
    heads = c.number("num_key_value_heads", c.number("num_attention_heads"))
    window = c.number("sliding_window") if kind == "sliding_attention" else 0
    return Layer(heads, c.head_dim, c.head_dim, window)


def _attention(c: Fields, family: Family) -> Weights:
    hidden, dim, heads = c.number("hidden_size"), c.head_dim, c.number("num_attention_heads")
    kv_heads = c.number("num_key_value_heads", heads)
    said = c.flag("attention_bias")
    qkv = said if family.qkv_bias is None else family.qkv_bias
    out = said if family.o_bias is None else family.o_bias
    return (
        linear(hidden, heads * dim * (2 if family.gated else 1), qkv)
        + linear(hidden, 2 * kv_heads * dim, qkv)
        + linear(heads * dim, hidden, out)
        + vector(2 * dim if family.qk_norm else 0)
    )


def _delta_net(c: Fields) -> Weights:
    """A Gated DeltaNet (arXiv:2412.06464) as Qwen3-Next and Qwen3.5 have it."""
    hidden, heads = c.number("hidden_size"), c.number("linear_num_value_heads")
    convolved, values = _convolved(c), heads * c.number("linear_value_head_dim")
    return (
        linear(hidden, convolved + values + 2 * heads)
        + linear(values, hidden)
        + vector(convolved * c.number("linear_conv_kernel_dim"))
        + vector(2 * heads + c.number("linear_value_head_dim"))
    )


def _convolved(c: Fields) -> int:
    """Channels of a DeltaNet's convolution: queries, keys and values."""
    keys = c.number("linear_num_key_heads") * c.number("linear_key_head_dim")
    return 2 * keys + c.number("linear_num_value_heads") * c.number("linear_value_head_dim")


def _state_bytes(c: Fields) -> int:
    """Bytes of a DeltaNet's state: the convolution's last inputs, and a matrix for each head."""
    last = (c.number("linear_conv_kernel_dim") - 1) * _convolved(c)
    matrix = c.number("linear_key_head_dim") * c.number("linear_value_head_dim")
    return BF16 * last + FLOAT32 * c.number("linear_num_value_heads") * matrix


def _feed_forward(c: Fields, index: int, kind: str) -> Weights:
    """Gate, up and down projections: of a layer, or of its experts and their router."""
    hidden = c.number("hidden_size")
    experts = c.number("num_experts", c.number("num_local_experts", 0))
    step = c.number("decoder_sparse_step", 1, least=1)
    if not experts or (index + 1) % step or index in c.listed("mlp_only_layers"):
        return mlp(hidden, c.number("intermediate_size"), c.flag("mlp_bias"))
    width = c.number("moe_intermediate_size", c.number("intermediate_size"))
    biased = kind == "gpt_oss"
    weights = linear(hidden, experts, biased)
    weights += mlp(hidden, width, biased).as_experts(experts, c.number("num_experts_per_tok"))
    if shared := c.number("shared_expert_intermediate_size", 0):
        weights += mlp(hidden, shared) + linear(hidden, 1)
    return weights


def mlp(hidden: int, width: int, bias: bool = False) -> Weights:
    """Gate, up and down projections."""
    return linear(hidden, 2 * width, bias) + linear(width, hidden, bias)
