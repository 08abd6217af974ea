"""From keys and values to packed rows, in one launch."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..codebook import CELL_TERMS, value_codebook
from ..codec import KEY_CLIPS, VALUE_CLIPS, VALUE_GAINS
from ..layout import PageLayout
from ..rotation import hadamard_factor, signs
from .gather import plane_constants
from .launch import Executor, Launch, integers, on_gpu

MAX_DIM = 512  # 32 lanes of 16 elements
MANY = 4096  # vectors, which keep a GPU busy
SIMDGROUPS = 4  # of a threadgroup
SEARCH_TERMS = {2: 1, 3: 3, 4: 3, 5: 5, 6: 7, 8: 9}
"""Value width -> terms of the polynomial that takes a value to its cell during the search."""


def encode(
    keys: mx.array, values: mx.array, layout: PageLayout, execute: Executor = on_gpu
) -> mx.array:
    """Compress the keys and values of some tokens, as ``codec.encode`` does up to rounding.

    What cannot be encoded is not refused, because the host would have to wait for the answer: a
    vector with a NaN or an infinite element, or one too long for an fp16 scale, gets a scale
    that is NaN.

    Args:
        keys: ``(num_kv_heads, num_tokens, head_dim)``, float32, float16 or bfloat16, after RoPE.
        values: the same shape and dtype.
        layout: the page layout.
        execute: what runs the launch.

    Returns:
        uint8 ``(num_kv_heads, num_tokens, row_bytes)``.

    Raises:
        ValueError: the layout has more than ``MAX_DIM`` dimensions.
    """
    if layout.dim > MAX_DIM:
        raise ValueError(f"{layout.dim} dimensions are too many: encode takes {MAX_DIM}")
    heads, num_tokens, head_dim = keys.shape
    dim, count = layout.dim, heads * num_tokens
    share = _share(dim, count)
    at_once = SIMDGROUPS * 32 * share // dim
    sign_bits, numbers, halves = _tables(layout)
    launch = Launch(
        kernel="encode",
        inputs={
            "keys": keys,
            "values": values,
            "count": integers(count),
            "signs": sign_bits,
            "numbers": numbers,
            "halves": halves,
        },
        template={
            "HEAD_DIM": head_dim,
            "D": dim,
            "M": hadamard_factor(dim),
            "E": share,
            "ROW": layout.row_bytes,
            "K_STEPS": len(KEY_CLIPS[layout.config.k_bits]),
            "V_STEPS": len(VALUE_CLIPS[layout.config.v_bits]),
            "SEARCH_TERMS": SEARCH_TERMS[layout.config.v_bits],
            "TERMS": CELL_TERMS[layout.config.v_bits],
            "GROUPS": SIMDGROUPS,
            **plane_constants(layout),
        },
        outputs={"rows": ((heads, num_tokens, layout.row_bytes), mx.uint8)},
        grid=(-(-count // at_once) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
    )
    return execute(launch)[0]


def _share(dim: int, count: int) -> int:
    """Elements of a vector that one lane transforms: many take fewer instructions and more time.

    Rows are the same bit by bit either way.
    """
    factor = hadamard_factor(dim)
    if factor != 1:
        return factor
    return 32 if count >= MANY else 16


@lru_cache
def _tables(layout: PageLayout) -> tuple[mx.array, ...]:
    """The inputs ``signs``, ``numbers`` and ``halves`` of the kernel."""
    k_bits, v_bits = layout.config.k_bits, layout.config.v_bits
    negative = (np.array(signs(layout.dim)) < 0).reshape(-1, 2).astype(np.uint32)
    words = negative[:, 0] << 15 | negative[:, 1] << 31

    norm = layout.dim**-0.5  # the kernel's rotation leaves it out
    codebook = value_codebook(v_bits)
    k_steps = np.array(KEY_CLIPS[k_bits]) / 2 ** (k_bits - 1)
    v_steps = np.array(VALUE_CLIPS[v_bits]) / codebook.largest
    unit = v_steps[len(v_steps) // 2]
    steps = v_steps / unit  # in the units in which cells are found
    b, a_by_b, c_by_b = codebook.coefficients
    cells = [codebook.cell_polynomial(CELL_TERMS[v_bits], step) for step in steps]
    numbers = [
        *(k_steps**2, k_steps * norm, 1 / k_steps / (2**k_bits - 1)),
        *(steps**2, v_steps * norm * VALUE_GAINS[v_bits]),
        (1 / unit, codebook.cell_centre),
        *(-np.array(cells) / (2**v_bits - 1)),
    ]
    searched = [codebook.cell_polynomial(SEARCH_TERMS[v_bits], step) for step in steps]
    halves = [
        *(1 / k_steps, 1 / k_steps / (2 ** (k_bits - 1) - 0.75)),
        *(1 / (steps * b), (codebook.cell_centre, a_by_b, c_by_b)),
        *(np.array(searched) / (2 ** (v_bits - 1) - 0.75)),
    ]
    numbers, halves = np.concatenate(numbers), np.concatenate(halves)
    pairs = halves.astype(np.float16).view(np.uint16) * np.uint32(0x10001)
    tables = mx.array(words), mx.array(numbers.astype(np.float32)), mx.array(pairs)
    mx.eval(*tables)
    return tables
