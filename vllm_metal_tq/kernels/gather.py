"""From pages to keys and values, in one launch: what prefill attends to."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import mlx.core as mx

from ..codebook import key_codebook, value_codebook
from ..layout import PLANE_BITS, PageLayout
from ..trellis import kernel_planes
from .launch import Executor, Launch, integers, on_gpu

THREADS = 256
ELEMENTS = 8  # of one thread


def gather(
    pages: mx.array,
    block_table: mx.array,
    num_tokens: int,
    layout: PageLayout,
    dtype: mx.Dtype = mx.float16,
    execute: Executor = on_gpu,
    *,
    room: int = 0,
) -> tuple[mx.array, mx.array]:
    """Decompress the pages of one sequence, as ``codec.decode`` does without a centre.

    Args:
        pages: uint8 ``(num_blocks, num_kv_heads, page_bytes)``.
        block_table: int32 ``(num_blocks_of_the_sequence,)``, which page block holds tokens
            ``i * block_size`` and on.
        num_tokens: tokens of the sequence, at least 1.
        layout: the layout of the pages.
        dtype: float16, bfloat16 or float32.
        execute: what runs the launch.
        room: slots after the tokens, which get zeros.

    Returns:
        Keys and values, ``(num_kv_heads, num_tokens + room, dim)`` in ``dtype``, still rotated.
    """
    _, heads, page_bytes = pages.shape
    offsets, levels = _tables(layout)
    shape = (heads, num_tokens + room, layout.dim)
    groups = -(-shape[1] * layout.dim // (ELEMENTS * THREADS))
    launch = Launch(
        kernel="gather",
        inputs={
            "pages": pages,
            "block_table": block_table,
            "num_tokens": integers(num_tokens, num_tokens + room),
            "offsets": offsets,
            "levels": levels,
        },
        template={
            "T": dtype,
            "D": layout.dim,
            "BLOCK": layout.config.block_size,
            "PAGE": page_bytes,
            "ROW": layout.row_bytes,
            "THREADS": THREADS,
            **plane_constants(layout),
        },
        outputs={"keys": (shape, dtype), "values": (shape, dtype)},
        grid=(groups * THREADS, heads, 2),
        threadgroup=(THREADS, 1, 1),
    )
    keys, values = execute(launch)
    return keys, values


def plane_constants(layout: PageLayout) -> dict[str, int]:
    """Bits of the planes and where they begin in a row, by the names of the kernel.

    The high bits of a trellis code are planes of one bit each, one behind the other.
    """
    constants: dict[str, int] = {}
    starts = [0, *accumulate(layout.plane_bytes)]
    number = 0
    for name, width in (("K", layout.config.k_width), ("V", layout.config.v_width)):
        low, high, taps = kernel_planes(width)
        constants |= {f"{name}_LOW": low, f"{name}_HIGH": high, f"{name}_TAPS": taps}
        constants |= {f"{name}_LOW_AT": starts[number], f"{name}_HIGH_AT": starts[number + 1]}
        number += len(PLANE_BITS[width])
    return constants | {"SCALES_AT": layout.code_bytes}


@lru_cache
def _tables(layout: PageLayout) -> tuple[mx.array, mx.array]:
    """Offsets ``(block_size, row_bytes)`` uint32, and the levels of keys and values."""
    codebooks = key_codebook(layout.config.k_width), value_codebook(layout.config.v_width)
    levels = mx.concatenate([book.levels(mx.arange(2**book.bits)) for book in codebooks])
    tables = mx.array(layout.byte_offsets), levels
    mx.eval(*tables)
    return tables
