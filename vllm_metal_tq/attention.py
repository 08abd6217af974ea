"""Attention over a compressed past and a chunk of new tokens, in plain MLX ops.

A query sees the keys and values of its own chunk as they came and everything older from the
pages. The past is decompressed for one layer at a time and stays rotated: queries and the
chunk are rotated to meet it, and only the output is rotated back.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .rotation import rotate, unrotate

Mask = mx.array | str | None


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    past: Sequence[mx.array],
    *,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend from the queries of a chunk to the past and to the chunk.

    Args:
        queries: ``(1, num_heads, L, head_dim)``.
        keys: ``(1, num_kv_heads, L, head_dim)``, as the model made them.
        values: the same shape.
        past: rotated keys and values of ``S`` older tokens, ``(1, num_kv_heads, S, dim)`` each.
        scale: factor of the logits.
        mask: as ``mx.fast.scaled_dot_product_attention`` takes it, over ``S + L`` keys.
        sinks: a learned logit for each head, ``(num_heads,)``, or None.

    Returns:
        ``(1, num_heads, L, head_dim)`` in the queries' dtype.
    """
    if past[0].shape[2] == 0:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    dtype = queries.dtype
    all_keys, all_values = (
        mx.concatenate([old, rotate(new)], axis=2).astype(dtype)
        for old, new in zip(past, (keys, values), strict=True)
    )
    output = mx.fast.scaled_dot_product_attention(
        rotate(queries).astype(dtype), all_keys, all_values, scale=scale, mask=mask, sinks=sinks
    )
    return unrotate(output, queries.shape[-1]).astype(dtype)


def decode_mask(mask: Mask, length: int, past_length: int, raw_window: int) -> mx.array:
    """The mask under which a chunk sees exactly what token-by-token decoding would.

    Written for a ``past`` that holds the chunk as well: query i sees the chunk's tokens at a
    distance below ``raw_window`` as they came, and all others through the pages.

    Args:
        mask: None or "causal", or bool ``(..., L, S + L)`` over the tokens.
        length: L, tokens of the chunk.
        past_length: S, tokens before the chunk.
        raw_window: how many tokens of its chunk, itself included, a query sees as they came.

    Returns:
        bool ``(..., L, S + 2 * L)``: over S + L tokens in pages, then L as they came.
    """
    query = mx.arange(past_length, past_length + length)[:, None]
    distance = query - mx.arange(past_length + length)
    visible = distance >= 0
    if isinstance(mask, mx.array):
        if mask.dtype != mx.bool_:
            raise ValueError(f"a raw window takes a bool mask, not {mask.dtype}")
        visible = visible & mask
    raw = (distance < raw_window) & (mx.arange(past_length + length) >= past_length)
    return mx.concatenate([visible & ~raw, (visible & raw)[..., past_length:]], axis=-1)
