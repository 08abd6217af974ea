"""DeepSeek V3: multi-head latent attention."""

from __future__ import annotations

from functools import reduce
from operator import add

from .fields import Fields
from .layers import Layer
from .plain import mlp
from .weights import NOTHING, Weights, linear, vector


def deepseek(c: Fields) -> tuple[list[Layer], Weights]:
    """Multi-head latent attention: a layer keeps a latent of each token, and one rotated key."""
    count, hidden = c.num_layers, c.number("hidden_size")
    latent, rope = c.number("kv_lora_rank"), c.number("qk_rope_head_dim")
    weights = [
        _latent_attention(c) + _feed_forward(c, index) + vector(2 * hidden)
        for index in range(count)
    ]
    return [Layer(1, latent, rope)] * count, reduce(add, weights, NOTHING)


def _latent_attention(c: Fields) -> Weights:
    hidden, heads, latent = (
        c.number(key) for key in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    plain, rope, value = (
        c.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    queries = heads * (plain + rope)
    if rank := c.number("q_lora_rank", 0):
        weights = linear(hidden, rank) + vector(rank) + linear(rank, queries)
    else:
        weights = linear(hidden, queries)
    weights += linear(hidden, latent + rope) + vector(latent)
    weights += linear(plain, heads * latent) + linear(latent, heads * value)
    return weights + linear(heads * value, hidden)


def _feed_forward(c: Fields, index: int) -> Weights:
    hidden, experts = c.number("hidden_size"), c.number("n_routed_experts", 0)
    step = c.number("moe_layer_freq", 1, least=1)
    if not experts or index < c.number("first_k_dense_replace", 0) or index % step:
        return mlp(hidden, c.number("intermediate_size"))
    width = c.number("moe_intermediate_size")
    weights = mlp(hidden, width).as_experts(experts, c.number("num_experts_per_tok"))
    weights += mlp(hidden, width * c.number("n_shared_experts", 0))
    return weights + vector(experts * (hidden + 1))  # the router is not quantised
