"""Every kernel against plain MLX ops on the CPU, on tiny inputs: quick enough for any machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from .. import codec
from ..centre import TURN, TWO_PI, Centre
from ..layout import PageLayout
from ..pages import PagePool
from ..rotation import rotate, unrotate
from ..tail import TAIL, Rings
from .decode import Options, decode
from .encode import encode
from .gather import gather
from .launch import Executor, on_gpu

LENGTHS = (150, 37)  # tokens in pages of each of two sequences; both end inside a block
MAX_TOKENS = 2048  # told to decode, so that it splits the context
NOT_IN_PAGES = 5  # tokens of each sequence that only the tail has
HEADS, KV_HEADS = 4, 2
SHIFT = 100_000  # positions of centred tokens less their indices

ROUNDING = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
"""Distance of neighbouring numbers, relative to their size."""

ENCODE_BOUND = 3e-3  # a vector may get another step, which is about as good
DECODE_BOUND = 5e-4  # half-precision levels and weights, float32 sums


@dataclass(frozen=True)
class Check:
    """One kernel against its oracle.

    Attributes:
        name: the kernel.
        variant: which of its variants or inputs, where there are several.
        ok: whether that error is within the bound.
        max_rel_error: the largest error of a vector relative to its length; for encode, how the
            square error of what it made of all vectors differs from the oracle's. None where
            there is no such number.
        message: what the kernel raised, or why there is no number.
    """

    name: str
    variant: str | None
    ok: bool
    max_rel_error: float | None
    message: str = ""


def check(
    layout: PageLayout,
    execute: Executor = on_gpu,
    dtype: mx.Dtype = mx.float32,
    variants: Sequence[str] = ("mma", "fma"),
    centred: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Check]:
    """Check every kernel once.

    Decode and merge are two launches of one function: the rows ``decode`` are both launches over
    pages alone, and the row ``merge`` adds a tail and sinks, which only merge sees.

    Args:
        layout: the layout of the pages.
        execute: what runs the launches.
        dtype: of the keys, values and queries: float32, float16 or bfloat16.
        variants: of decode; with none, decode and merge are not checked.
        centred: check decode and merge with a centre, too.
        progress: called with checks done and checks in all.
    """
    case = _Case(layout, dtype)
    todo: list[Callable[[], Check]] = [
        partial(_check, "encode", "few", ENCODE_BOUND, partial(case.encode_error, execute, False)),
        partial(_check, "encode", "many", ENCODE_BOUND, partial(case.encode_error, execute, True)),
        partial(_check, "gather", None, 2 * ROUNDING[dtype], lambda: case.gather_error(execute)),
        *_attention_checks(case, execute, variants, ""),
    ]
    if centred:
        centred_case = _Case(layout, dtype, _centre(layout.head_dim))
        todo += _attention_checks(centred_case, execute, variants, ", centre")
    checks = []
    for run in todo:
        checks.append(run())
        progress(len(checks), len(todo))
    return checks


def _attention_checks(
    case: _Case, execute: Executor, variants: Sequence[str], more: str
) -> list[Callable[[], Check]]:
    if not variants:
        return []
    bound = DECODE_BOUND + ROUNDING[case.dtype]
    decode = [(variant, partial(case.decode_error, execute, variant)) for variant in variants]
    return [
        *(partial(_check, "decode", variant + more, bound, error) for variant, error in decode),
        partial(_check, "merge", "tail, sinks" + more, bound, partial(case.merge_error, execute)),
    ]


def _check(name: str, variant: str | None, bound: float, error: Callable[[], float]) -> Check:
    try:
        worst = error()
    except Exception as e:  # compilers, MLX and the simulator share no base class
        return Check(name, variant, False, None, str(e).strip() or type(e).__name__)
    if not math.isfinite(worst):
        return Check(name, variant, False, None, "the result holds NaN or infinite elements")
    return Check(name, variant, worst <= bound, worst)


def _centre(head_dim: int) -> Centre:
    """A random one; an odd head_dim, which no rotary embedding has, leaves out an element."""
    rng = np.random.default_rng(1)
    pairs = np.arange(head_dim // 2)
    steps = 10_000.0 ** (-pairs / max(len(pairs), 1)) / TWO_PI * TURN
    smoothing = np.ones((KV_HEADS, head_dim))
    smoothing[:, : 2 * len(pairs)] = np.tile(rng.uniform(0.8, 1.25, (KV_HEADS, len(pairs))), 2)
    shape = KV_HEADS, head_dim
    arrays = 2 * rng.normal(size=shape), smoothing, 0.5 * rng.normal(size=shape)
    return Centre(
        np.column_stack([pairs, pairs + len(pairs), steps]).astype(np.uint32),
        *(mx.array(x.astype(np.float32)) for x in arrays),
    )


class _Case:
    """Two sequences of random keys and values, encoded by the codec into shuffled pages."""

    def __init__(self, layout: PageLayout, dtype: mx.Dtype, centre: Centre | None = None):
        self.layout, self.dtype, self.centre = layout, dtype, centre
        rng = np.random.default_rng(0)

        def random(*shape: int) -> mx.array:
            return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)

        shape = (KV_HEADS, sum(LENGTHS), layout.head_dim)
        counts = [-(-length // layout.config.block_size) for length in LENGTHS]
        blocks = np.split(rng.permutation(sum(counts)), np.cumsum(counts)[:-1])
        table = np.zeros((len(LENGTHS), max(counts)), np.int32)
        for row, own in zip(table, blocks, strict=True):
            row[: len(own)] = own
        with mx.stream(mx.cpu):
            self.keys, self.values = random(*shape), random(*shape)
            self.queries = random(len(LENGTHS), HEADS, 1, layout.head_dim)
            tail_shape = (len(LENGTHS), KV_HEADS, TAIL, layout.head_dim)
            self.tail = random(*tail_shape), random(*tail_shape)
            self.sinks = mx.array(rng.normal(size=HEADS).astype(np.float32))
            self.table = mx.array(table)
            indices = np.concatenate([np.arange(length) for length in LENGTHS])
            positions = mx.array((indices + SHIFT).astype(np.int32))
            if centre:  # three tokens of four lie near the means
                near = (mx.arange(len(indices)) % 4 > 0)[:, None]
                self.keys = mx.where(near, self.keys + centre.at(positions), self.keys)
                self.values = mx.where(near, self.values + centre.value_mean[:, None], self.values)
            rows = codec.encode(self.keys, self.values, layout, centre, positions)
            self.decoded = _decoded(rows, layout, centre, positions)
            self.pages = _pages(rows, layout, blocks)
            mx.eval(self.decoded, self.pages, self.queries, self.tail, self.sinks, self.table)

    def encode_error(self, execute: Executor, many: bool) -> float:
        """How the square error of decoded keys or values differs from the oracle's, relatively.

        Two codes or two steps may be equally good but for rounding, so bytes are not compared.
        """
        rows = encode(self.keys, self.values, self.layout, execute, many=many)
        mx.eval(rows)
        with mx.stream(mx.cpu):
            given = [rotate(x) for x in (self.keys, self.values)]
            errors = [
                [(x - y).square().sum().item() for x, y in zip(found, given, strict=True)]
                for found in (_decoded(rows, self.layout), self.decoded)
            ]
        worst = [abs(ours / oracle - 1) for ours, oracle in zip(*errors, strict=True)]
        return math.nan if any(map(math.isnan, worst)) else max(worst)

    def gather_error(self, execute: Executor) -> float:
        """Error of the first sequence, read from its pages."""
        count = LENGTHS[0]
        got = gather(self.pages, self.table[0], count, self.layout, self.dtype, execute)
        return max(
            _worst(ours, oracle[:, :count].astype(self.dtype, stream=mx.cpu))
            for ours, oracle in zip(got, self.decoded, strict=True)
        )

    def decode_error(self, execute: Executor, variant: str) -> float:
        """Error of attention over pages alone."""
        return self._attention_error(execute, variant, 0, None, None)

    def merge_error(self, execute: Executor) -> float:
        """Error of attention over pages, a tail and sinks."""
        return self._attention_error(execute, "mma", NOT_IN_PAGES, self.tail, self.sinks)

    def _attention_error(
        self,
        execute: Executor,
        variant: str,
        tail_size: int,
        tail: Rings | None,
        sinks: mx.array | None,
    ) -> float:
        scale = self.layout.head_dim**-0.5
        got = decode(
            self.queries,
            self.pages,
            self.table,
            mx.array([[length, length + tail_size, SHIFT] for length in LENGTHS], mx.int32),
            self.layout,
            Options(scale),
            centre=self.centre,
            max_tokens=MAX_TOKENS,
            variant=variant,
            execute=execute,
            tail=tail,
            sinks=sinks,
        )
        return _worst(got, self._attended(scale, tail, sinks))

    def _attended(self, scale: float, tail: Rings | None, sinks: mx.array | None) -> mx.array:
        """Softmax attention in float32, sequence by sequence."""
        attended, start = [], 0
        with mx.stream(mx.cpu):
            for i, length in enumerate(LENGTHS):
                past = (x[:, start : start + length] for x in self.decoded)
                parts = [unrotate(x, self.layout.head_dim) for x in past]
                if self.centre:
                    parts[0] = parts[0] / self.centre.smoothing[:, None]
                if tail is not None:
                    slots = mx.arange(length, length + NOT_IN_PAGES) % TAIL
                    parts = [
                        mx.concatenate([x, ring[i][:, slots]], axis=1)
                        for x, ring in zip(parts, tail, strict=True)
                    ]
                keys, values = (mx.repeat(x, HEADS // KV_HEADS, axis=0) for x in parts)
                logits = scale * self.queries[i].astype(mx.float32) @ keys.swapaxes(1, 2)
                if sinks is not None:
                    logits = mx.concatenate([logits, sinks[:, None, None]], axis=-1)
                weights = mx.softmax(logits, axis=-1)[..., : keys.shape[1]]
                attended.append(weights @ values)
                start += length
            return mx.stack(attended)


def _decoded(
    rows: mx.array,
    layout: PageLayout,
    centre: Centre | None = None,
    positions: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What the codec makes of rows: float32 ``(KV_HEADS, num_tokens, dim)`` each, rotated."""
    num_tokens = rows.shape[1]
    blocks = np.arange(-(-num_tokens // layout.config.block_size))
    pages = _written(rows, layout, np.arange(num_tokens), len(blocks)).swapaxes(0, 1)
    if positions is not None:
        unused = len(blocks) * layout.config.block_size - num_tokens
        positions = mx.pad(positions, (0, unused))
    parts = codec.decode(pages, layout, centre, positions)
    keys, values = (x.flatten(1, 2)[:, :num_tokens] for x in parts)
    return keys, values


def _pages(rows: mx.array, layout: PageLayout, blocks: list[np.ndarray]) -> mx.array:
    """Pages with the rows of every sequence in its blocks."""
    size = layout.config.block_size
    slots = [
        own[np.arange(length) // size] * size + np.arange(length) % size
        for own, length in zip(blocks, LENGTHS, strict=True)
    ]
    return _written(rows, layout, np.concatenate(slots), sum(map(len, blocks)))


def _written(rows: mx.array, layout: PageLayout, slots: np.ndarray, num_blocks: int) -> mx.array:
    """Pages with the rows in their slots and NaN scales elsewhere."""
    pool = PagePool(layout, KV_HEADS)
    pages = mx.full((num_blocks, KV_HEADS, layout.page_bytes), 0xFF, mx.uint8)
    pool.adopt(pages, list(range(num_blocks)))
    pool.write((tuple(int(slot) for slot in slots),), rows[None])
    return pool.pages


def _worst(got: mx.array, want: mx.array) -> float:
    """The largest error of a vector relative to its length."""
    mx.eval(got, want)
    with mx.stream(mx.cpu):
        got, want = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (got, want))
    return float(_relative(got - want, want).max())


def _relative(difference: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.linalg.norm(difference, axis=-1) / np.linalg.norm(whole, axis=-1)
    return ratio
