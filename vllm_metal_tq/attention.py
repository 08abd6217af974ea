"""Attention over a compressed past and recent tokens as they came, in plain MLX ops.

A query sees the keys and values of recent tokens, its own chunk among them, as they came, and
everything older from the pages. The past is decompressed for one layer at a time and stays
rotated, its keys smoothed: queries and recent tokens are brought to meet it, and only the output
is rotated back.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .centre import Centre
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
    centre: Centre | None = None,
) -> mx.array:
    """Attend from the queries of a chunk to the past and to recent tokens.

    Args:
        queries: ``(1, num_heads, L, head_dim)``.
        keys: ``(1, num_kv_heads, R, head_dim)`` of the ``R >= L`` recent tokens, the chunk last,
            as the model made them.
        values: the same shape.
        past: rotated keys, smoothed if there is a centre, and rotated values of ``S`` older
            tokens, as ``codec.decode`` gives them, and room for the recent ones:
            ``(1, num_kv_heads, S + R, dim)`` each in the queries' dtype. What the room holds does
            not matter.
        scale: factor of the logits.
        mask: as ``mx.fast.scaled_dot_product_attention`` takes it, over ``S + R`` keys.
        sinks: a learned logit for each head, ``(num_heads,)``, or None.
        centre: calibration of the layer, or None.

    Returns:
        ``(1, num_heads, L, head_dim)`` in the queries' dtype.
    """
    first = past[0].shape[2] - keys.shape[2]
    if first == 0:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    dtype, head_dim = queries.dtype, queries.shape[-1]
    if centre:
        queries, keys = centre.unsmooth(queries), keys * centre.smoothing[:, None]
    # Written in place: a second copy of a layer's keys and values would be the peak of memory.
    everything = (
        mx.slice_update(old, rotate(new).astype(dtype), mx.array([first]), (2,))
        for old, new in zip(past, (keys, values), strict=True)
    )
    output = mx.fast.scaled_dot_product_attention(
        rotate(queries).astype(dtype), *everything, scale=scale, mask=mask, sinks=sinks
    )
    return unrotate(output, head_dim).astype(dtype)


def window_mask(length: int, num_tokens: int, window: int) -> mx.array:
    """Which of ``num_tokens`` tokens each of the last ``length`` sees of the ``window`` up to it.

    Returns:
        bool ``(length, num_tokens)``.
    """
    tokens = mx.arange(num_tokens)
    distance = tokens[-length:, None] - tokens
    return (distance >= 0) & (distance < window)


def last_columns(mask: mx.array, num_tokens: int) -> mx.array:
    """A mask over the last tokens, made one over ``num_tokens``: others are hidden."""
    missing = num_tokens - mask.shape[-1]
    if missing <= 0:
        return mask[..., -missing:]
    around = [(0, 0)] * (mask.ndim - 1) + [(missing, 0)]
    hidden = False if mask.dtype == mx.bool_ else -mx.inf
    return mx.pad(mask, around, constant_values=mx.array(hidden, mask.dtype))


def decode_mask(mask: Mask, length: int, num_tokens: int, recent: int, raw_window: int) -> mx.array:
    """The mask under which a chunk sees exactly what token-by-token decoding would.

    Written for a past that holds all tokens, followed by recent tokens as they came: query i
    sees tokens at a distance below ``raw_window`` as they came, and all others through the pages.

    Args:
        mask: None or "causal", or bool ``(..., L, num_tokens)``.
        length: L, tokens of the chunk.
        num_tokens: tokens in all, the chunk among them.
        recent: R, how many of the last tokens there are as they came.
        raw_window: how many tokens, itself included, a query sees as they came, where they are
            among the recent ones.

    Returns:
        bool ``(..., L, num_tokens + R)``: over all tokens in pages, then R as they came.
    """
    tokens = mx.arange(num_tokens)
    distance = tokens[-length:, None] - tokens
    visible = distance >= 0
    if isinstance(mask, mx.array):
        if mask.dtype != mx.bool_:
            raise ValueError(f"a raw window takes a bool mask, not {mask.dtype}")
        visible = visible & mask
    first = num_tokens - recent
    raw = (distance < raw_window) & (tokens >= first)
    return mx.concatenate([visible & ~raw, (visible & raw)[..., first:]], axis=-1)
