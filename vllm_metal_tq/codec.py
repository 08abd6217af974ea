"""Encode keys and values into packed rows, and decode pages of them, in plain MLX ops.

This is the oracle of every kernel.

Both codecs rotate a head vector, try a few steps, keep the codes with the least square error, and
store one fp16 scale, which is that step. They differ in the codebook, and in that values are made
as long as they were, on average: codes shrink every value by the same factor, and attention would
sum those errors coherently. Trellis codes (``trellis.py``) have one codebook for both, and one
step, the vector's root mean square.

A zero vector, or one whose scale is below fp16's smallest number, decodes to zeros.

With a ``Centre`` keys are smoothed, and the mean of keys and of values is left out of each vector
that it makes shorter. The sign bits of the two scales say where: that of the key's is the flag f,
that of the value's the flag g.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import mlx.core as mx

from .centre import Centre
from .codebook import Gaussian, Uniform, key_codebook, value_codebook
from .config import T2, T3, TRELLIS_WIDTHS
from .layout import PLANE_BITS, Array, PageLayout
from .rotation import rotate
from .trellis import TRELLISES, unfold

# Steps tried per vector: bits -> where the last cell of keys ends, and where the last level of
# values lies, as fractions of the largest element. benchmarks/scale_search.py judges them.
# Keys get more of them, because their errors weigh more.
KEY_CLIPS = {
    2: (0.578, 0.678, 0.765, 0.862),
    3: (0.722, 0.814, 0.881, 0.974),
    4: (0.86, 0.913, 0.969, 1.029),
    5: (0.965, 1.0, 1.024),
    6: (0.998, 1.01, 1.047),
    8: (1.004, 1.012, 1.02),
}
VALUE_CLIPS = {
    2: (0.441, 0.517, 0.583, 0.657),
    3: (0.692, 0.78, 0.862),
    4: (0.907, 0.982),
    5: (0.955, 0.99, 1.026),
    6: (0.99, 1.144, 1.171),
    8: (1.389,),
}

# Width -> what makes the product of a key and its code as large as that of the key and itself.
# Codes of the least square error are shorter than what they stand for, and so would all logits be.
# tools/train_trellis.py measures those of trellis codes, here and below.
KEY_GAINS = {2: 1.13, 3: 1.036, 4: 1.011, 5: 1.0025, 6: 1.0007, 8: 1.0, T2: 1.082, T3: 1.0203}

# Width -> what makes values as long as they were, on average.
VALUE_GAINS = {2: 1.0625, 3: 1.0165, 4: 1.0035, 5: 1.001, 6: 1.0002, 8: 1.0, T2: 1.041, T3: 1.0104}

SLICE = 256  # tokens encoded at a time: trying four steps takes 40 times the memory of its input


def encode(
    keys: mx.array,
    values: mx.array,
    layout: PageLayout,
    centre: Centre | None = None,
    positions: mx.array | None = None,
) -> mx.array:
    """Compress the keys and values of some tokens.

    Args:
        keys: ``(..., num_tokens, head_dim)``, any float dtype, after RoPE; with a centre
            ``(..., num_kv_heads, num_tokens, head_dim)``.
        values: the same shape.
        layout: the page layout; its row is what comes back.
        centre: calibration of the layer, or None.
        positions: int32 ``(num_tokens,)``, what RoPE saw; needed with a centre.

    Returns:
        uint8 ``(..., num_tokens, row_bytes)``, evaluated slice by slice.

    Raises:
        ValueError: the shapes differ from each other or from the layout, a centre comes without
            positions, or an element is NaN, infinite, or too large for an fp16 scale.
    """
    check_shapes(keys, values, layout)
    rows = []
    for i in range(0, keys.shape[-2], SLICE):
        some = slice(i, i + SLICE)
        where = None if positions is None else positions[some]
        rows.append(_encode(keys[..., some, :], values[..., some, :], layout, centre, where))
    return mx.concatenate(rows, axis=-2)


def widened(values: mx.array, layout: PageLayout) -> mx.array:
    """Values ``(..., v_head_dim)`` with zeros up to ``head_dim``; others as they are."""
    missing = layout.head_dim - layout.v_head_dim
    if not missing or values.shape[-1] != layout.v_head_dim:
        return values
    return mx.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def check_shapes(keys: mx.array, values: mx.array, layout: PageLayout) -> None:
    """Raise a ValueError where keys and values do not fit the layout."""
    if keys.shape != values.shape or keys.shape[-1] != layout.head_dim:
        raise ValueError(
            f"keys {keys.shape} and values {values.shape} must have one shape, "
            f"ending in head_dim {layout.head_dim}"
        )


def _encode(
    keys: mx.array,
    values: mx.array,
    layout: PageLayout,
    centre: Centre | None,
    positions: mx.array | None,
) -> mx.array:
    short_keys, short_values = keys, values
    if centre:
        t, m = centre.smoothing[:, None], centre.value_mean[:, None]
        short_keys, f = _shorter(keys * t, centre.at(_needed(positions)) * t)
        short_values, g = _shorter(values, m)
    k_codes, k_scale = encode_keys(rotate(short_keys), layout.config.k_width)
    v_codes, v_scale = encode_values(rotate(short_values), layout.config.v_width)
    scales = mx.stack([k_scale, v_scale], axis=-1)
    if centre:
        scales = mx.where(mx.stack([f, g], axis=-1), -scales, scales)
    rows = mx.concatenate(
        [
            *_pack(k_codes, layout.config.k_width),
            *_pack(v_codes, layout.config.v_width),
            scales.view(mx.uint8),
        ],
        axis=-1,
    )
    finite = mx.isfinite(scales).all()
    mx.eval(rows, finite)
    if not finite.item():
        raise ValueError(f"cannot encode: {_what_is_wrong(keys, values)}")
    return rows


def _needed(positions: mx.array | None) -> mx.array:
    if positions is None:
        raise ValueError("a centre needs the positions of the tokens")
    return positions


def _shorter(x: mx.array, mean: mx.array) -> tuple[mx.array, mx.array]:
    """Each vector less the mean where that is shorter, and bool ``(...)``: where it is.

    Lengths decide because errors are about proportional to them. Choosing by the codes' true errors
    takes a second search, for 0.2 % less error of keys and 4 % of values, and no smaller KL
    divergence (docs/codec.md).
    """
    x = x.astype(mx.float32)
    rest = x - mean
    flag = mx.square(rest).sum(axis=-1) < mx.square(x).sum(axis=-1)
    return mx.where(flag[..., None], rest, x), flag


def decode(
    pages: mx.array,
    layout: PageLayout,
    centre: Centre | None = None,
    positions: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Decompress pages.

    Args:
        pages: uint8 ``(..., page_bytes)``; with a centre ``(num_kv_heads, num_pages, page_bytes)``.
        layout: the layout that their rows were encoded with.
        centre: what they were encoded with; None gives back what is stored, means left out.
        positions: int32 ``(num_pages * block_size,)``; needed with a centre.

    Returns:
        Keys and values, float32 ``(..., block_size, dim)`` each, still rotated, keys still
        smoothed.

    Raises:
        ValueError: a centre comes without positions.
    """
    *planes, scales = layout.split(pages)
    scales = mx.abs(scales.view(mx.float16).astype(mx.float32))
    k_width, v_width = layout.config.k_width, layout.config.v_width
    k_planes, v_planes = planes[: len(PLANE_BITS[k_width])], planes[len(PLANE_BITS[k_width]) :]
    keys = key_codebook(k_width).levels(_unpack(k_planes, k_width)) * scales[..., :1]
    values = value_codebook(v_width).levels(_unpack(v_planes, v_width)) * scales[..., 1:]
    if not centre:
        return keys, values
    f, g = (flag.flatten(1) for flag in flags(pages, layout))
    flat_keys, flat_values = add_means(
        keys.flatten(1, 2), values.flatten(1, 2), f, g, centre, _needed(positions)
    )
    return flat_keys.reshape(keys.shape), flat_values.reshape(values.shape)


def add_means(
    keys: mx.array, values: mx.array, f: mx.array, g: mx.array, centre: Centre, positions: mx.array
) -> tuple[mx.array, mx.array]:
    """Add to stored keys and values the means that were left out where flags say so.

    Args:
        keys: ``(num_kv_heads, n, dim)``, smoothed and rotated.
        values: the same shape, rotated.
        f: bool ``(num_kv_heads, n)``, flags of the keys.
        g: the same of the values.
        centre: what they were encoded with.
        positions: int32 ``(n,)``.

    Returns:
        Keys and values, float32.
    """
    key_means = rotate(centre.at(positions) * centre.smoothing[:, None])
    value_means = rotate(centre.value_mean)[:, None]
    keys = keys + mx.where(f[..., None], key_means, 0)
    return keys, values + mx.where(g[..., None], value_means, 0)


def flags(pages: mx.array, layout: PageLayout) -> tuple[mx.array, mx.array]:
    """The flags f and g of every token: bool ``(..., block_size)`` each. -0.0 has its flag."""
    signs = layout.split(pages)[-1].view(mx.uint16) >> 15 == 1
    return signs[..., 0], signs[..., 1]


def encode_keys(y: mx.array, width: int) -> tuple[mx.array, mx.array]:
    """Quantise rotated keys.

    Args:
        y: float32 ``(..., dim)``.
        width: code width.

    Returns:
        uint8 codes ``(..., dim)`` and fp16 scales ``(...)``.
    """
    if trellis := TRELLISES.get(width):
        return trellis.nearest(y, KEY_GAINS[width])
    steps = [clip / 2 ** (width - 1) for clip in KEY_CLIPS[width]]
    return nearest(y, steps, Uniform(width), KEY_GAINS[width])


def encode_values(y: mx.array, width: int) -> tuple[mx.array, mx.array]:
    """Quantise rotated values.

    Args:
        y: float32 ``(..., dim)``.
        width: code width.

    Returns:
        uint8 codes ``(..., dim)`` and fp16 scales ``(...)``.
    """
    if trellis := TRELLISES.get(width):
        return trellis.nearest(y, VALUE_GAINS[width])
    codebook = Gaussian(width)
    steps = [clip / codebook.largest for clip in VALUE_CLIPS[width]]
    return nearest(y, steps, codebook, VALUE_GAINS[width])


def nearest(
    y: mx.array, steps: Sequence[float], codebook: Uniform | Gaussian, gain: float
) -> tuple[mx.array, mx.array]:
    """Codes of y at the best of the steps, and this step times the gain, in fp16.

    The best step has the least |y - step * z|^2, where z are the codes' levels. Steps are given as
    fractions of the largest element of each vector, which says nearly all about the best step from
    4 bits on.
    """
    size = mx.abs(y).max(axis=-1, keepdims=True)
    steps = size * mx.array(list(steps)).reshape(-1, *(1,) * y.ndim)
    safe = mx.where(steps == 0, 1, steps)  # zero vectors
    codes = codebook.codes(y / safe)
    error = mx.square(y - steps * codebook.levels(codes)).sum(axis=-1, keepdims=True)
    best = mx.argmin(error, axis=0, keepdims=True)
    codes, step = (mx.take_along_axis(x, best, axis=0)[0] for x in (codes, steps))
    return codes, (step[..., 0] * gain).astype(mx.float16)


def _pack(codes: mx.array, width: int) -> list[mx.array]:
    """Split codes into planes and pack each: element d at bit (d mod 8/b)*b of its byte."""
    planes = []
    for bits in PLANE_BITS[width]:
        fields = (codes & ((1 << bits) - 1)).reshape(*codes.shape[:-1], -1, 8 // bits)
        shifts = mx.arange(0, 8, bits, dtype=mx.uint8)
        planes.append((fields << shifts).sum(axis=-1).astype(mx.uint8))
        codes = codes >> bits
    return planes


def _unpack(planes: list[mx.array], width: int) -> mx.array:
    """The numbers of levels that planes stand for, uint8 ``(..., dim)``."""
    planes, bits = unfolded(planes, width)
    return joined(map(fields, planes, bits), bits)


def joined(parts: Iterable[Array], bits: Sequence[int]) -> Array:
    """Uint8 numbers of which the parts, of one shape, are so many bits each, the low ones first."""
    parts = iter(parts)
    numbers = next(parts)
    for part, shift in zip(parts, accumulate(bits), strict=False):
        numbers = numbers | part << shift
    return numbers


def unfolded(planes: list[Array], width: int) -> tuple[list[Array], tuple[int, ...]]:
    """Planes whose fields together are numbers of levels, and bits of these fields.

    Those of scalar codes are what is stored.
    """
    if width not in TRELLIS_WIDTHS:
        return planes, PLANE_BITS[width]
    planes = unfold(planes, width)
    return planes, (1,) * len(planes)


def fields(plane: mx.array, bits: int) -> mx.array:
    """Give every field of so many bits a byte of its own.

    Moving all fields of a byte at once, in an integer with a byte for each, takes half the time
    of stacking them on a CPU: field i comes from bit i*bits to bit 8*i.
    """
    if bits == 8:
        return plane
    wide = plane.astype({1: mx.uint64, 2: mx.uint32, 4: mx.uint16}[bits])
    spread = wide
    for i in range(1, 8 // bits):
        spread = spread | (wide << (i * (8 - bits)))
    return spread.view(mx.uint8) & ((1 << bits) - 1)


def _what_is_wrong(keys: mx.array, values: mx.array) -> str:
    for name, x in (("keys", keys), ("values", values)):
        if mx.isnan(x).any().item():
            return f"{name} hold NaN"
        if mx.isinf(x).any().item():
            return f"{name} hold an infinite element"
    return "a head vector is too long for an fp16 scale (largest: 65504)"
