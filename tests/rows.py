"""Rows to pages and back, byte by byte as ``PageLayout.byte_offsets`` says."""

import mlx.core as mx
import numpy as np

from vllm_metal_tq import codec
from vllm_metal_tq.layout import PageLayout


def decoded(
    rows: mx.array, layout: PageLayout, centre=None, positions=None
) -> tuple[mx.array, mx.array]:
    """Keys and values of rows ``(..., row_bytes)``, through a page for each."""
    pages = np.zeros((*rows.shape[:-1], layout.page_bytes), np.uint8)
    pages[..., layout.byte_offsets[0]] = np.array(rows)
    if centre:
        positions = mx.repeat(positions, layout.config.block_size)  # all slots of a token's page
    pages = codec.decode(mx.array(pages), layout, centre, positions)
    return tuple(x[..., 0, :] for x in pages)


def rows_of(table, num_tokens: int | None = None) -> np.ndarray:
    """The rows that a block table holds: uint8 ``(num_kv_heads, num_tokens, row_bytes)``."""
    num_tokens = table.num_tokens if num_tokens is None else num_tokens
    layout = table.pool.layout
    pages = np.array(table.read(num_tokens))
    rows = pages[..., layout.byte_offsets]
    return rows.reshape(pages.shape[0], -1, layout.row_bytes)[:, :num_tokens]
