"""From keys and values to packed rows, in one launch."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..centre import Centre
from ..codebook import CELL_TERMS, ERRORS, TRELLIS_LEVELS, Gaussian
from ..codec import KEY_CLIPS, KEY_GAINS, VALUE_CLIPS, VALUE_GAINS
from ..config import TRELLIS_WIDTHS
from ..layout import PageLayout
from ..rotation import hadamard_factor, signs
from ..tail import TAIL
from ..trellis import WARM
from .gather import plane_constants
from .launch import Executor, Launch, integers, on_gpu

MAX_DIM = 512  # 32 lanes of 16 elements
MANY = 4096  # vectors, which keep a GPU busy
SIMDGROUPS = 4  # of a threadgroup
PAIR_LANES = {64: 8, 128: 16}
"""Largest dim -> lanes that find the trellis codes of two vectors, where there are many vectors.

Else 32. Fewer are faster, but their vectors take more threadgroup memory.
"""
COPIED = 2  # words of the tail, of up to 16 bytes, that a thread copies
LAYERS = 512  # of which tables are kept
SEARCH_TERMS = {2: 1, 3: 3, 4: 3, 5: 5, 6: 7, 8: 9}
"""Value width -> terms of the polynomial that takes a value to its cell during the search."""

_Tables = tuple[list[np.ndarray], list[np.ndarray]]
"""What ``numbers`` and ``halves`` have of keys or of values, levels of trellis codes left out."""


def encode(
    keys: mx.array,
    values: mx.array,
    layout: PageLayout,
    execute: Executor = on_gpu,
    *,
    start: mx.array | None = None,
    centre: Centre | None = None,
    uncentred: int = 0,
    many: bool | None = None,
) -> mx.array:
    """Compress tokens of one sequence, ``(num_kv_heads, L, head_dim)``: ``store`` without a tail.

    Args and result are those of ``store``, less the first dimension.
    """
    heads, _, head_dim = keys.shape
    ring = mx.zeros((1, heads, TAIL, head_dim), keys.dtype)
    rows, _, _ = store(
        keys[None],
        values[None],
        (ring, ring),
        layout,
        starts=None if start is None else start[None],
        centre=centre,
        uncentred=uncentred,
        many=many,
        execute=execute,
    )
    return rows[0]


def store(
    keys: mx.array,
    values: mx.array,
    tail: tuple[mx.array, mx.array],
    layout: PageLayout,
    *,
    starts: mx.array | None = None,
    centre: Centre | None = None,
    uncentred: int = 0,
    many: bool | None = None,
    execute: Executor = on_gpu,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compress the keys and values of new tokens, and put the last of them into the tails.

    The rows are those of ``codec.encode`` up to rounding, and the tail that of ``tail.pushed``.
    What cannot be encoded is not refused, because the host would have to wait for the answer: a
    vector with a NaN or an infinite element, or one too long for an fp16 scale, gets a scale
    that is NaN.

    Args:
        keys: ``(B, num_kv_heads, L, head_dim)``, float32, float16 or bfloat16, after RoPE.
        values: the same shape and dtype.
        tail: keys and values, ``(B, num_kv_heads, TAIL, head_dim)`` each.
        layout: the page layout.
        starts: int32 ``(B, 2)``, position and index in its sequence of the first token of each;
            None is zeros.
        centre: calibration of the layer, or None.
        uncentred: how many tokens of each sequence, the first ones, get no flag f.
        many: whether work is shared out as for vectors that keep a GPU busy; None: if they do.
            Rows are the same.
        execute: what runs the launch.

    Returns:
        Rows, uint8 ``(B, num_kv_heads, L, row_bytes)``, and keys and values of the new tails.

    Raises:
        ValueError: the layout has more than ``MAX_DIM`` dimensions.
    """
    if layout.dim > MAX_DIM:
        raise ValueError(f"{layout.dim} dimensions are too many: encode takes {MAX_DIM}")
    batch, heads, length, head_dim = keys.shape
    dim, count = layout.dim, batch * heads * length
    trellis = not {layout.config.k_width, layout.config.v_width}.isdisjoint(TRELLIS_WIDTHS)
    share, lanes, simdgroups = _split(dim, count >= MANY if many is None else many, trellis)
    at_once = simdgroups * (32 // lanes if trellis else 32 * share // dim)
    wide = head_dim * keys.dtype.size % 16 == 0  # 16 bytes are copied at a time
    words = batch * heads * TAIL * (head_dim * keys.dtype.size // 16 if wide else head_dim)
    groups = (1 + trellis) * -(-count // at_once) + -(-words // (COPIED * simdgroups * 32))
    sign_bits, numbers, halves = _tables(layout)
    # Not read without a centre, but of the same types and address space.
    turns, means = _centre_tables(centre, dim) if centre else (sign_bits, numbers)
    launch = Launch(
        kernel="encode",
        inputs={
            "keys": keys,
            "values": values,
            "tail_keys": tail[0].astype(keys.dtype),
            "tail_values": tail[1].astype(keys.dtype),
            "count": integers(count, length, uncentred, heads),
            "starts": integers(*[0] * 2 * batch) if starts is None else starts,
            "signs": sign_bits,
            "numbers": numbers,
            "halves": halves,
            "turns": turns,
            "means": means,
        },
        template={
            "T": keys.dtype,
            "HEAD_DIM": head_dim,
            "E": share,
            "PAIR": lanes,
            "GROUPS": simdgroups,
            "CENTRE": int(centre is not None),
            "ALIKE": alike(centre, dim, share) if centre else 0,
            **_constants(layout),
        },
        outputs={
            "rows": ((batch, heads, length, layout.row_bytes), mx.uint8),
            "next_keys": (tail[0].shape, keys.dtype),
            "next_values": (tail[1].shape, keys.dtype),
        },
        grid=(groups * simdgroups * 32, 1, 1),
        threadgroup=(simdgroups * 32, 1, 1),
    )
    rows, next_keys, next_values = execute(launch)
    return rows, next_keys, next_values


def _constants(layout: PageLayout) -> dict[str, int]:
    """What the kernel is compiled with for a layout, whatever its launch."""
    k_width, v_width = layout.config.k_width, layout.config.v_width
    return {
        "D": layout.dim,
        "M": hadamard_factor(layout.dim),
        "ROW": layout.row_bytes,
        "K_STEPS": len(KEY_CLIPS.get(k_width, [None])),  # trellis codes search none
        "V_STEPS": len(VALUE_CLIPS.get(v_width, [None])),
        "SEARCH_TERMS": SEARCH_TERMS.get(v_width, 1),
        "TERMS": CELL_TERMS.get(v_width, 1),
        "WARM": WARM,
        "TAIL": TAIL,
        "COPIED": COPIED,
        **plane_constants(layout),
    }


def _split(dim: int, many: bool, trellis: bool) -> tuple[int, int, int]:
    """How work is shared out; rows are the same bit by bit in any case.

    Returns:
        Elements of a vector that one lane transforms, lanes that find the trellis codes of two
        vectors in either direction, and SIMD-groups of a threadgroup. Many elements or few lanes
        take fewer instructions and more time.
    """
    share = hadamard_factor(dim)
    if share == 1:
        share = 32 if many and not trellis else 16
    lanes = next((n for most, n in PAIR_LANES.items() if trellis and many and dim <= most), 32)
    return share, lanes, 2 if trellis else SIMDGROUPS


@lru_cache
def _tables(layout: PageLayout) -> tuple[mx.array, ...]:
    """The inputs ``signs``, ``numbers`` and ``halves`` of the kernel."""
    k_width, v_width = layout.config.k_width, layout.config.v_width
    negative = (np.array(signs(layout.dim)) < 0).reshape(-1, 2).astype(np.uint32)
    words = negative[:, 0] << 15 | negative[:, 1] << 31

    norm = layout.dim**-0.5  # the kernel's rotation leaves it out
    books = [TRELLIS_LEVELS[width] for width in (k_width, v_width) if width in TRELLIS_WIDTHS]
    levels = [np.array(book.levels(mx.arange(1 << book.bits))) for book in books]
    k_numbers, k_halves = _of_trellis(k_width, KEY_GAINS, norm) or _key_tables(k_width, norm)
    v_numbers, v_halves = _of_trellis(v_width, VALUE_GAINS, norm) or _value_tables(v_width, norm)
    room = np.zeros(8)  # MLX passes fewer numbers in another address space
    numbers = np.concatenate([*k_numbers, *v_numbers, room])
    halves = np.concatenate([*levels, *k_halves, *v_halves])
    pairs = halves.astype(np.float16).view(np.uint16) * np.uint32(0x10001)
    tables = mx.array(words), mx.array(numbers.astype(np.float32)), mx.array(pairs)
    mx.eval(*tables)
    return tables


def _of_trellis(width: int, gains: dict[int, float], norm: float) -> _Tables | None:
    if width not in TRELLIS_WIDTHS:
        return None
    # Less what is expected of them, sums of errors stay small in halves.
    return [np.array([norm * gains[width], ERRORS[width]])], []


def _key_tables(width: int, norm: float) -> _Tables:
    steps = np.array(KEY_CLIPS[width]) / 2 ** (width - 1)
    numbers = [steps**2, steps * norm * KEY_GAINS[width], 1 / steps / (2**width - 1)]
    return numbers, [1 / steps, 1 / steps / (2 ** (width - 1) - 0.75)]


def _value_tables(width: int, norm: float) -> _Tables:
    codebook = Gaussian(width)
    v_steps = np.array(VALUE_CLIPS[width]) / codebook.largest
    unit = v_steps[len(v_steps) // 2]
    steps = v_steps / unit  # in the units in which cells are found
    b, a_by_b, c_by_b = codebook.coefficients
    centre = codebook.cell_centre
    cells = [codebook.cell_polynomial(CELL_TERMS[width], step) for step in steps]
    searched = [codebook.cell_polynomial(SEARCH_TERMS[width], step) for step in steps]
    numbers = [
        *(steps**2, v_steps * norm * VALUE_GAINS[width], np.array([1 / unit, centre])),
        *(-np.array(cells) / (2**width - 1)),
    ]
    halves = [
        *(1 / (steps * b), np.array([centre, a_by_b, c_by_b])),
        *(np.array(searched) / (2 ** (width - 1) - 0.75)),
    ]
    return numbers, halves


@lru_cache(maxsize=LAYERS)
def _centre_tables(centre: Centre, dim: int) -> tuple[mx.array, mx.array]:
    """The inputs ``turns`` and ``means`` of the kernel."""
    first, second = np.array(centre.pairs[:, :2]).T
    mu, t, m = (np.array(x, np.float64) for x in (centre.mu, centre.smoothing, centre.value_mean))
    heads, head_dim = mu.shape
    negative, sign = np.zeros((heads, head_dim)), np.array(signs(dim))[:head_dim]
    negative[:, first], negative[:, second] = -mu[:, second], mu[:, first]
    rows = np.zeros((heads, 4, dim))
    rows[..., :head_dim] = np.stack([t * mu, t * negative, t, m], axis=1) * sign
    squares = np.zeros((heads, 4))  # two of them keep what follows aligned
    squares[:, 0], squares[:, 1] = ((t * mu) ** 2).sum(axis=1), (m**2).sum(axis=1)
    means = np.concatenate([rows.reshape(heads, -1), squares], axis=1)
    tables = mx.array(_by_element(centre, dim)), mx.array(means.astype(np.float32))
    mx.eval(*tables)
    return tables


def alike(centre: Centre, dim: int, share: int) -> int:
    """How far apart in a lane's share elements are that turn by the same phase; 0: not at all."""
    return _alike(_by_element(centre, dim).tobytes(), share, hadamard_factor(dim) == 1)


def _by_element(centre: Centre, dim: int) -> np.ndarray:
    """Step of the phase of each element, uint32 ``(dim,)``; 0 where RoPE does nothing."""
    first, second, steps = np.array(centre.pairs).T
    turns = np.zeros(dim, np.uint32)
    turns[first], turns[second] = steps, steps
    return turns


@lru_cache
def _alike(turns: bytes, share: int, contiguous: bool) -> int:
    turns = np.frombuffer(turns, np.uint32)
    if contiguous:  # element e of lane p is 8 * (p + lanes * (e // 8)) + e % 8
        held = turns.reshape(share // 8, -1, 8).swapaxes(0, 1).reshape(-1, share)
    else:
        held = turns.reshape(share, -1).T
    for apart in range(1, share):
        firsts = [e for e in range(share - apart) if e // apart % 2 == 0]
        if np.array_equal(held[:, firsts], held[:, [e + apart for e in firsts]]):
            return apart
    return 0
