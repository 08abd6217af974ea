"""Centres of made-up layers, and keys and values that lie around them."""

import mlx.core as mx
import mlx.nn as nn

from vllm_metal_tq import rope
from vllm_metal_tq.centre import Centre

BASE = 10000.0


def random(num_kv_heads: int, head_dim: int, size: float = 2.0, seed: int = 0) -> Centre:
    """A centre whose means are ``size`` times as long as what ``typical`` adds to them."""
    mu, m, t = (
        mx.random.normal((num_kv_heads, head_dim), key=mx.random.key(seed + i)) for i in range(3)
    )
    pairs = rope.probe(nn.RoPE(head_dim, base=BASE), head_dim).pairs
    half = mx.exp(0.3 * t[:, : head_dim // 2])  # pairs are half-split
    return Centre(pairs, size * mu, mx.concatenate([half, half], axis=1), size * m)


def typical(centre: Centre, count: int, first: int = 0, seed: int = 9) -> tuple[mx.array, mx.array]:
    """Keys and values around the means: float32 ``(num_kv_heads, count, head_dim)`` each."""
    shape = (centre.mu.shape[0], count, centre.mu.shape[1])
    noise = [mx.random.normal(shape, key=mx.random.key(seed + i)) for i in range(2)]
    keys = centre.at(mx.arange(first, first + count)) + noise[0]
    return keys, centre.value_mean[:, None] + noise[1]
