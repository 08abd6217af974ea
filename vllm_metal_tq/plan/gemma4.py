"""Gemma 4: per-layer head dims and inputs, and layers that read the cache of others."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add

from .fields import Fields
from .layers import Layer
from .plain import layer_of, mlp
from .weights import NOTHING, Weights, linear, vector


def gemma4(c: Fields) -> tuple[list[Layer], Weights]:
    """Gemma 4: full attention has wider heads, and the last layers read the cache of others."""
    every = c.number("sliding_window_pattern", 6, least=1)
    kinds = c.kinds(lambda i: "sliding_attention" if (i + 1) % every else "full_attention")
    own = len(kinds) - c.number("num_kv_shared_layers", 0)
    weights = [_weights(c, each, index >= own) for index, each in enumerate(kinds)]
    layers = [_layer(c, each) for each in kinds[:own]]
    if not set(kinds[own:]) <= set(kinds[: max(own, 0)]):
        raise ValueError(f"{c.name}: num_kv_shared_layers leaves no layers for others to read")
    for each in set(kinds[own:]):  # its last own layer of the kind is the one that is read
        last = max(i for i in range(own) if kinds[i] == each)
        layers[last] = replace(layers[last], shared=True)
    return layers, reduce(add, weights, _per_layer_inputs(c, len(kinds)))


def _layer(c: Fields, kind: str) -> Layer:
    if kind == "sliding_attention":
        return layer_of(c, kind)
    heads = c.number("num_key_value_heads")
    if c.flag("attention_k_eq_v"):
        heads = c.number("num_global_key_value_heads", heads)
    dim = c.number("global_head_dim", c.head_dim)
    return Layer(heads, dim, dim)


def _weights(c: Fields, kind: str, reads_other: bool) -> Weights:
    hidden, heads = c.number("hidden_size"), c.number("num_attention_heads")
    layer = _layer(c, kind)
    dim = layer.key_dim
    weights = linear(hidden, heads * dim) + linear(heads * dim, hidden) + vector(dim)
    if not reads_other:
        one_for_both = c.flag("attention_k_eq_v") and kind == "full_attention"
        weights += linear(hidden, layer.kv_heads * dim * (1 if one_for_both else 2)) + vector(dim)
    wide = 2 if reads_other and c.flag("use_double_wide_mlp") else 1
    weights += mlp(hidden, wide * c.number("intermediate_size")) + vector(4 * hidden + 1)
    if c.flag("enable_moe_block"):
        experts = c.number("num_experts")
        each = mlp(hidden, c.number("moe_intermediate_size"))
        weights += each.as_experts(experts, c.number("top_k_experts"))
        weights += linear(hidden, experts) + vector(4 * hidden + experts)
    if width := c.number("hidden_size_per_layer_input", 0):
        weights += linear(hidden, width) + linear(width, hidden) + vector(hidden)
    return weights


def _per_layer_inputs(c: Fields, layers: int) -> Weights:
    """Gemma 4's second table of embeddings, of which a token reads one row."""
    width = c.number("hidden_size_per_layer_input", 0)
    if not width:
        return NOTHING
    table = linear(layers * width, c.number("vocab_size_per_layer_input", c.number("vocab_size")))
    return table.as_table() + linear(c.number("hidden_size"), layers * width) + vector(width)
