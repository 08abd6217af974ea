"""vllm-metal's attention with the compressed cache: project, attend, project back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from vllm_metal.attention.impls import sdpa, sdpa_wrapper

from .cache import PagedCache
from .paged import PagedLayer

_dense_forward = sdpa_wrapper.sdpa_forward


def forward(
    inner: Any, x: mx.array, ctx: Any, kv_cache: Any, layer_idx: int, *args: Any, **options: Any
) -> Any:
    """vllm-metal's ``sdpa_forward``: project, attend, project back."""
    layer = kv_cache.layers[layer_idx] if isinstance(kv_cache, PagedCache) else None
    if layer is None:
        return _dense_forward(inner, x, ctx, kv_cache, layer_idx, *args, **options)
    shared = args[0] if args else options.get("shared_kv")
    return _forward(inner, x, ctx, kv_cache, layer, shared, options.get("position_embeddings"))


def _forward(
    inner: Any,
    x: mx.array,
    ctx: Any,
    kv_cache: PagedCache,
    layer: PagedLayer,
    shared: Any,
    embeddings: Any,
) -> Any:
    heads = getattr(inner, "n_heads", None) or inner.num_attention_heads
    kv_heads = getattr(inner, "n_kv_heads", None) or inner.num_key_value_heads
    scale = getattr(inner, "scale", None)
    queries, keys, values, gate, kv = sdpa.prepare_sdpa_qkv(
        inner, x, ctx, heads, kv_heads, shared, position_embeddings=embeddings
    )
    head_dim = queries.shape[-1]
    queries, keys, values = sdpa.pad_qkv_to_cache_head_dim(
        queries, keys, values, head_dim, layer.pool.layout.head_dim
    )
    segments = kv_cache.segments(ctx)
    if shared is not None and keys.shape[2] != queries.shape[2]:
        keys, values = kv_cache.last(segments, keys, values)
    attended = layer.attend(
        queries,
        keys,
        values,
        segments,
        scale=inner.sm_scale if scale is None else scale,
        sinks=getattr(inner, "sinks", None),
        stored=shared is not None,
    )
    out = attended[..., :head_dim].swapaxes(1, 2).reshape(*x.shape[:2], -1)
    if gate is not None:
        out = out * mx.sigmoid(gate)
    out = sdpa.apply_g_proj_gate(inner, out, x, heads, head_dim)
    return inner.o_proj(out), kv


def install() -> None:
    """Let vllm-metal attend through ``forward``."""
    sdpa_wrapper.sdpa_forward = forward
