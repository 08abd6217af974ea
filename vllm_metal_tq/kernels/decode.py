"""Attention of a few query rows over compressed pages: two launches, decode and merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from ..centre import Centre
from ..codebook import Octic, key_codebook, value_codebook
from ..layout import PageLayout
from ..rotation import hadamard_factor, signs
from ..tail import TAIL, Rings
from ..trellis import kernel_planes
from . import centre as tables
from .launch import Executor, Launch, dialect, integers, numbers, on_gpu

MAX_ROWS = 8
MAX_DIM = 256  # 32 lanes of 8 dimensions of the values
THREADGROUP_BYTES = 32768
SIMD = 32
SIMDGROUPS = 8  # of a threadgroup, at most
MERGE_SIMDGROUPS = 8
PROCESSORS = 132  # of an H200; each has room for 16 SIMD-groups of decode

WINDOWS = 32, 64, 96, 128  # tokens that decode_mma may centre at a time
MIN_WINDOW = WINDOWS[0]
FMA_WINDOW = 64  # tokens that decode_fma centres at a time

LOG2E = 1 / math.log(2)


@dataclass(frozen=True)
class Options:
    """What a model asks of attention, besides queries and pages.

    Attributes:
        scale: factor of the logits.
        window: how many tokens a query sees, itself included; 0 is all.
        softcap: logits become ``softcap * tanh(logit / softcap)``; 0 leaves them.
        sparse_v: values are skipped where all weights of a sub-block of 16 tokens lie below this
            fraction of the largest weight met so far. An output element then errs by at most
            ``num_tokens * sparse_v * max |value|``. 0 skips none.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sparse_v: float = 0.0


def decode(
    queries: mx.array,
    pages: mx.array,
    block_table: mx.array,
    lengths: mx.array,
    layout: PageLayout,
    options: Options,
    *,
    tail: Rings | None = None,
    sinks: mx.array | None = None,
    centre: Centre | None = None,
    max_tokens: int,
    variant: str | None = None,
    execute: Executor = on_gpu,
) -> mx.array:
    """Attend from the last tokens of each sequence to all that they see.

    Args:
        queries: ``(B, num_heads, L, head_dim)``, L at most 8; row l is the token of index
            ``lengths[:, 1] - L + l`` and sees no token after itself.
        pages: uint8 ``(num_blocks, num_kv_heads, page_bytes)``.
        block_table: int32 ``(B, max_blocks)``.
        lengths: int32 ``(B, 3)``: tokens that are read from pages, tokens in all, and how far
            positions run ahead of indices in the pages.
        layout: the layout of ``pages``.
        options: scale, window, softcap, sparse_v.
        tail: a ring of the last keys and values as the model made them, ``(B, num_kv_heads, TAIL,
            head_dim)`` each in the queries' dtype: the token of index i lies in slot i % TAIL.
            The tokens ``lengths[:, 0]`` and on are read from it.
        sinks: a learned logit for each head, ``(num_heads,)``.
        centre: calibration that the pages were encoded with, or None.
        max_tokens: at least the largest of ``lengths[:, 0]``; it decides how the work is split.
        variant: ``mma`` or ``fma``; None is ``variant_for`` this GPU.
        execute: what runs the launches.

    Returns:
        ``(B, num_heads, L, head_dim)`` in the queries' dtype.
    """
    paged = _decode_launch(
        queries, pages, block_table, lengths, layout, options, centre, max_tokens, variant
    )
    (partial,) = execute(paged)
    num_kv_heads = pages.shape[1]
    merged = _merge_launch(
        partial, queries, lengths, layout, options, centre, num_kv_heads, tail, sinks
    )
    return execute(merged)[0]


def _decode_launch(
    queries: mx.array,
    pages: mx.array,
    block_table: mx.array,
    lengths: mx.array,
    layout: PageLayout,
    options: Options,
    centre: Centre | None,
    max_tokens: int,
    variant: str | None,
) -> Launch:
    """What the pages give: float32 ``(B, num_heads, L, splits, dim + 2 + CENTRE)``."""
    (batch, num_heads, rows, head_dim), num_kv_heads = queries.shape, pages.shape[1]
    dim, columns = layout.dim, rows * num_heads // num_kv_heads
    variant = variant or variant_for(columns, dim)
    width = min(columns, 8 if variant == "mma" else _most_for_fma(dim))
    groups = -(-columns // width)
    runs = batch * num_kv_heads * groups  # of the context, each as long as it is
    in_flight = _in_flight(max_tokens * runs)
    simdgroups = _simdgroups(variant, width, dim, centre is not None, in_flight)
    splits = _splits(max_tokens, runs, simdgroups, in_flight)
    tokens = -(-max_tokens // (splits * simdgroups))
    centring = _centring(centre, variant, width, dim, simdgroups, tokens)
    max_blocks = block_table.shape[1]
    template = _template(queries, layout, options, centre) | {"BS": layout.config.block_size}
    template |= zip(("KL", "KH", "KT"), kernel_planes(layout.config.k_width), strict=True)
    template |= zip(("VL", "VH", "VT"), kernel_planes(layout.config.v_width), strict=True)
    template |= {"N": width, "NSG": simdgroups, "NB": _sub_blocks(layout)}
    template |= {"SPARSE": int(options.sparse_v > 0)} | centring.template
    return Launch(
        f"decode_{variant}",
        {
            "queries": queries,
            "pages": pages,
            "block_table": block_table,
            "lengths": lengths,
            "signs": centring.signs,
            "means": centring.means,
            "turns": centring.turns,
            "shape": integers(
                num_heads, num_kv_heads, rows, head_dim, max_blocks, groups, options.window
            ),
            "numbers": numbers(*_logits(options), options.sparse_v, *_levels(layout)),
        },
        template,
        {"partial": ((batch, num_heads, rows, splits, dim + 2 + (centre is not None)), mx.float32)},
        (splits * simdgroups * SIMD, num_kv_heads * groups, batch),
        (simdgroups * SIMD, 1, 1),
    )


def _levels(layout: PageLayout) -> tuple[float, ...]:
    """b, a/b and c/b of the values' levels, and of the keys' of a trellis."""
    keys = key_codebook(layout.config.k_width)
    own = keys.coefficients if isinstance(keys, Octic) else ()
    return *value_codebook(layout.config.v_width).coefficients, *own


def _merge_launch(
    partial: mx.array,
    queries: mx.array,
    lengths: mx.array,
    layout: PageLayout,
    options: Options,
    centre: Centre | None,
    num_kv_heads: int,
    tail: Rings | None,
    sinks: mx.array | None,
) -> Launch:
    """Splits and tail together, rotated back: the shape and dtype of ``queries``."""
    (batch, num_heads, rows, head_dim), splits = queries.shape, partial.shape[3]
    keys, values = tail or (queries, queries)
    threads = MERGE_SIMDGROUPS * SIMD
    return Launch(
        "merge",
        {
            "partial": partial,
            "queries": queries,
            "lengths": lengths,
            "tail_keys": keys,
            "tail_values": values,
            "sinks": signs(layout.dim) if sinks is None else sinks.astype(mx.float32),
            "signs": signs(layout.dim),
            "value_mean": centre.value_mean if centre else signs(layout.dim),
            "shape": integers(rows, head_dim, splits, options.window),
            "numbers": numbers(*_logits(options)),
        },
        _template(queries, layout, options, centre)
        | {"NSG": MERGE_SIMDGROUPS, "TAIL": TAIL if tail else 0, "SINKS": int(sinks is not None)},
        {"attended": (queries.shape, queries.dtype)},
        (num_heads // num_kv_heads * rows * threads, num_kv_heads, batch),
        (threads, 1, 1),
    )


def _template(
    queries: mx.array, layout: PageLayout, options: Options, centre: Centre | None
) -> dict[str, int | mx.Dtype]:
    """The constants of both launches."""
    dim = layout.dim
    return {
        "T": queries.dtype,
        "D": dim,
        "M": hadamard_factor(dim),
        "SOFTCAP": int(options.softcap > 0),
        "CENTRE": int(centre is not None),
    }


@dataclass(frozen=True)
class _Centring:
    """What centring adds to ``_decode_launch``."""

    signs: mx.array
    means: mx.array
    turns: mx.array
    template: dict[str, int]


def _centring(
    centre: Centre | None, variant: str, width: int, dim: int, simdgroups: int, tokens: int
) -> _Centring:
    """For threadgroups of so many SIMD-groups, each of which attends to so many tokens."""
    if centre is None:
        # Not used, but compiled: it must not make arrays of no elements.
        template = {"S": MIN_WINDOW} if variant == "mma" else {"S": FMA_WINDOW, "TURNED": 0}
        return _Centring(signs(dim), signs(dim), tables.nothing(), template)
    if variant == "mma":
        window = _window(centre, width, dim, simdgroups, tokens)
        turns, more = tables.fragments(centre, dim, window, dialect()), {}
    else:
        window = FMA_WINDOW
        turns, turned = tables.rows(centre, dim, window)
        more = {"TURNED": turned}
    own = tables.smoothed_signs(centre, dim), tables.means(centre, dim), turns
    return _Centring(*own, {"S": window} | more)


def _window(centre: Centre, width: int, dim: int, simdgroups: int, tokens: int) -> int:
    """Tokens of a window of ``decode_mma``: what takes least time for so many of a SIMD-group.

    Longer ones are fewer, but threadgroup memory has to hold them, the tables' functions have to
    span them, and the last one may be computed for little.
    """
    at_once = windows_at_once(width)
    possible = [
        window
        for window in WINDOWS
        if _threadgroup_bytes("mma", simdgroups, width, dim, window) <= THREADGROUP_BYTES
        and tables.fits(centre, dim, window)
    ]
    return min(possible, key=lambda window: -(-tokens // (at_once * window)) * (window + 100))


def windows_at_once(width: int) -> int:
    """So many that they and the columns fill 8 columns of a fragment; see ``metal/centre.h``."""
    return 8 >> (width - 1).bit_length()


def variant_for(columns: int, dim: int) -> str:
    """The faster kernel for so many query rows and heads of a KV head.

    Apple: plain multiply-adds (``fma``) as long as all columns fit one pass, since the 8x8
    products of fragments (``mma``) run on the same units and cost the same for 1 column as for 8
    (estimated). NVIDIA: fragments always, since their products cost next to nothing (measured on
    an H200). docs/performance.md has both.
    """
    return "fma" if dialect() == "metal" and columns <= _most_for_fma(dim) else "mma"


def _most_for_fma(dim: int) -> int:
    """Columns that plain multiply-adds serve in one pass within 128 registers (estimated)."""
    return 4 if dim <= 128 else 2


def _logits(options: Options) -> tuple[float, float]:
    """The factor and the softcap of the kernels, which take logits in base 2."""
    if options.softcap:
        return 2 * LOG2E * options.scale / options.softcap, LOG2E * options.softcap
    return LOG2E * options.scale, 0.0


def _in_flight(tokens: int) -> int:
    """SIMD-groups a processor: few where each would get few of the ``tokens`` of all runs.

    What a SIMD-group does before its first token and after its last takes as long as some 100
    tokens, and longer the more of them do it side by side. Bounds as measured on an H200.
    """
    if tokens < PROCESSORS * 4 * 96:
        return 4
    return 8 if tokens < PROCESSORS * 8 * 192 else 16


def _simdgroups(variant: str, width: int, dim: int, centred: bool, in_flight: int) -> int:
    """SIMD-groups of a threadgroup: as many as its memory holds."""
    window = (MIN_WINDOW if variant == "mma" else FMA_WINDOW) if centred else 0
    count = min(SIMDGROUPS, in_flight)
    while _threadgroup_bytes(variant, count, width, dim, window) > THREADGROUP_BYTES:
        count //= 2
    return count


def _threadgroup_bytes(variant: str, simdgroups: int, width: int, dim: int, window: int) -> int:
    """Threadgroup memory of a decode kernel; a window of 0 is no centring."""
    columns = 1 if width == 1 else -(-width // 2) * 2
    pool, coefficients = width * dim, 0
    if window and variant == "mma":
        pool = max(pool, windows_at_once(width) * window * columns)
        coefficients = 8 * (dim + 16)
    elif window:
        pool = max(pool, 16 * columns + max(window * width, width * (dim + 8)) + 3)
        coefficients = width * (dim + 16)
    return 4 * (simdgroups * (pool + 3 * width) + coefficients)


def _sub_blocks(layout: PageLayout) -> int:
    """Sub-blocks that a SIMD-group takes at a time: 2, or 1 where registers would run out."""
    return 2 if layout.dim <= 128 and layout.config.k_width != 8 else 1


@lru_cache
def _splits(max_tokens: int, runs: int, simdgroups: int, in_flight: int) -> int:
    """Splits of the context: one resident wave of SIMD-groups, each with at least 32 tokens."""
    most = max(max_tokens // (32 * simdgroups), 1)
    return max(min(PROCESSORS * in_flight // (runs * simdgroups), most), 1)
