"""From keys and values to packed rows, in one launch."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..codebook import value_codebook
from ..codec import KEY_CLIPS, VALUE_STRETCHES
from ..layout import PageLayout
from ..rotation import hadamard_factor, signs
from .gather import plane_constants
from .launch import Executor, Launch, integers, on_gpu

MAX_DIM = 512  # 32 lanes of 16 elements
SIMDGROUPS = 4  # of a threadgroup
TERMS = {2: 1, 3: 3, 4: 5, 5: 7, 6: 9, 8: 13}
"""Value width -> terms of the polynomial that takes a value to its cell."""


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
    share = _share(dim)
    at_once = SIMDGROUPS * 32 * share // dim
    sign_bits, steps = _tables(layout)
    launch = Launch(
        kernel="encode",
        inputs={
            "keys": keys,
            "values": values,
            "count": integers(count),
            "signs": sign_bits,
            "steps": steps,
        },
        template={
            "HEAD_DIM": head_dim,
            "D": dim,
            "M": hadamard_factor(dim),
            "E": share,
            "ROW": layout.row_bytes,
            "STEPS": len(KEY_CLIPS),
            "TERMS": TERMS[layout.config.v_bits],
            "FINAL_TERMS": _final_terms(layout.config.v_bits),
            "GROUPS": SIMDGROUPS,
            **plane_constants(layout),
        },
        outputs={"rows": ((heads, num_tokens, layout.row_bytes), mx.uint8)},
        grid=(-(-count // at_once) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
    )
    return execute(launch)[0]


def _share(dim: int) -> int:
    """Elements of a vector that one lane transforms."""
    factor = hadamard_factor(dim)
    return 16 if factor == 1 else factor


@lru_cache
def _tables(layout: PageLayout) -> tuple[mx.array, mx.array]:
    """The inputs ``signs`` and ``steps`` of the kernel."""
    share, dim, bits = _share(layout.dim), layout.dim, layout.config.v_bits
    negative = np.array(signs(dim)) < 0
    contiguous = hadamard_factor(dim) == 1
    negative = negative.reshape(-1, share) if contiguous else negative.reshape(share, -1).T
    words = (negative << np.arange(share)).sum(axis=1)

    boundaries = _boundaries(bits)
    centre = boundaries[-1] ** 2 / 2
    numbers = [2 ** (layout.config.k_bits - 1) / clip for clip in KEY_CLIPS]
    for terms in (TERMS[bits], _final_terms(bits)):
        for stretch in VALUE_STRETCHES:
            numbers += _to_cell(boundaries * stretch, centre, terms)
    numbers += [centre, *value_codebook(bits).coefficients]
    numbers += [1 / stretch for stretch in VALUE_STRETCHES]
    tables = mx.array(words.astype(np.uint32)), mx.array(numbers, mx.float32)
    mx.eval(*tables)
    return tables


def _final_terms(bits: int) -> int:
    """Terms of the polynomial for the codes themselves: up to 4 bits one that is exact."""
    return 2 ** (bits - 1) - 1 if bits <= 4 else TERMS[bits]


def _boundaries(bits: int) -> np.ndarray:
    """Where the cells of positive values meet."""
    levels = np.array(value_codebook(bits).levels(mx.arange(2 ** (bits - 1), 2**bits)), np.float64)
    return (levels[1:] + levels[:-1]) / 2


def _to_cell(boundaries: np.ndarray, centre: float, terms: int) -> list[float]:
    """Coefficients of a polynomial P: y * P(y * y - centre) is near k at the k-th boundary.

    Its integer part is then the cell of y. Powers of y * y about a centre keep precision in
    float32. Odd numbers of terms rise beyond the last boundary, even ones fall.
    """
    squares = boundaries**2 - centre
    powers = boundaries[:, None] * squares[:, None] ** np.arange(terms)
    size = np.abs(powers).max(axis=0)
    fit, *_ = np.linalg.lstsq(powers / size, np.arange(1, len(boundaries) + 1), rcond=None)
    return (fit / size).tolist()
