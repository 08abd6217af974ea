"""Attention of one new token over compressed pages, beside mlx_lm's caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from .. import codec
from ..config import TurboQuantConfig
from ..kernels.decode import Options, decode
from ..layout import PageLayout
from ..pages import PagePool
from ..plan.caches import MLX_GROUP
from ..rotation import rotate, unrotate
from . import caches, clock

Attend = Callable[[mx.array], mx.array]
"""Attention of queries over a cache."""

ENCODED_BLOCKS = 32  # encoded once; a cache is made of their copies
CHECKED_ROWS = 3


@dataclass(frozen=True)
class Shape:
    """One call of attention: sequences, tokens of each, query heads, KV heads."""

    batch: int
    context: int
    heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        if min(self.batch, self.context, self.heads, self.kv_heads) < 1:
            raise ValueError(f"shape {self.text}: all four numbers must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"shape {self.text}: HKV must divide H")

    def bf16_bytes(self, head_dim: int) -> int:
        """Bytes of keys and values, uncompressed."""
        return 4 * self.batch * self.context * self.kv_heads * head_dim

    @property
    def text(self) -> str:
        """As ``parse`` takes it."""
        return f"{self.batch},{self.context},{self.heads},{self.kv_heads}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``B,ctx,H,HKV``.

        Raises:
            ValueError: it is not four numbers that fit each other.
        """
        numbers = text.split(",")
        if len(numbers) != 4 or not all(number.strip().isdecimal() for number in numbers):
            raise ValueError(f"shape {text!r} must be four whole numbers: B,ctx,H,HKV")
        return cls(*map(int, numbers))


GPU_SHAPES = [
    Shape(1, 131072, 32, 8),
    Shape(8, 32768, 32, 8),
    Shape(32, 8192, 32, 8),
    Shape(8, 32768, 8, 8),
    Shape(8, 32768, 64, 8),
]
CPU_SHAPES = [Shape(1, 2048, 8, 2), Shape(4, 512, 8, 2)]


@dataclass
class PagedCache:
    """Pages of random keys and values in shuffled blocks, attended to by the kernels.

    Without a GPU the reference in plain MLX ops takes their place.
    """

    shape: Shape
    layout: PageLayout
    pages: mx.array = field(init=False)
    block_table: mx.array = field(init=False)
    lengths: mx.array = field(init=False)

    def __post_init__(self) -> None:
        shape, size = self.shape, self.layout.config.block_size
        blocks = -(-shape.context // size)
        self.pages = _random_pages(shape.batch * blocks, shape.kv_heads, self.layout)
        order = np.random.default_rng(0).permutation(shape.batch * blocks).astype(np.int32)
        self.block_table = mx.array(order.reshape(shape.batch, blocks))
        self.lengths = mx.array([[shape.context, shape.context, 0]] * shape.batch, mx.int32)
        mx.eval(self.pages, self.block_table, self.lengths)

    @property
    def row_bytes(self) -> int:
        """Bytes that a call must read: those of all tokens."""
        shape = self.shape
        return shape.batch * shape.context * shape.kv_heads * self.layout.row_bytes

    def attend(self, queries: mx.array) -> mx.array:
        """Attention of ``(B, H, 1, head_dim)`` over all tokens."""
        if clock.gpu_backend() is None:
            return self._reference(queries)
        return decode(
            queries,
            self.pages,
            self.block_table,
            self.lengths,
            self.layout,
            Options(self.layout.head_dim**-0.5),
            max_tokens=self.shape.context,
        )

    def _reference(self, queries: mx.array) -> mx.array:
        dtype, context = queries.dtype, self.shape.context
        past = codec.decode(self.pages[self.block_table], self.layout)
        keys, values = (x.swapaxes(1, 2).flatten(2, 3)[:, :, :context].astype(dtype) for x in past)
        output = mx.fast.scaled_dot_product_attention(
            rotate(queries).astype(dtype), keys, values, scale=self.layout.head_dim**-0.5
        )
        return unrotate(output, self.layout.head_dim).astype(dtype)

    def rel_error(self) -> float:
        """Error for float32 queries, relative to float64, of a few rows (sequence, head)."""
        shape = self.shape
        queries = mx.random.normal((shape.batch, shape.heads, 1, self.layout.head_dim))
        attended = self.attend(queries)
        share = np.linspace(0, 1, CHECKED_ROWS)
        rows = [(round(x * (shape.batch - 1)), round(x * (shape.heads - 1))) for x in share]
        got, given = ([x[row] for row in rows] for x in (attended, queries))
        mx.eval(got, given)
        got, given = (np.array(mx.concatenate(x)).astype(np.float64) for x in (got, given))
        want = np.stack([self._in_float64(*row, x) for row, x in zip(rows, given, strict=True)])
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    def _in_float64(self, sequence: int, head: int, query: np.ndarray) -> np.ndarray:
        kv_head = head * self.shape.kv_heads // self.shape.heads
        pages = self.pages[self.block_table[sequence], kv_head]
        mx.eval(pages)  # a copy, so that the cache itself stays on the GPU
        with mx.stream(mx.cpu):
            past = (x.flatten(0, 1) for x in codec.decode(pages, self.layout))
            past = [unrotate(x, self.layout.head_dim)[: self.shape.context] for x in past]
            keys, values = (np.array(x).astype(np.float64) for x in past)
        logits = keys @ query * self.layout.head_dim**-0.5
        weights = np.exp(logits - logits.max())
        attended: np.ndarray = weights @ values / weights.sum()
        return attended


def _random_pages(num_blocks: int, kv_heads: int, layout: PageLayout) -> mx.array:
    """Pages of normally distributed keys and values: random copies of a few encoded blocks."""
    size = layout.config.block_size
    shape = (kv_heads, ENCODED_BLOCKS * size, layout.head_dim)
    rows = codec.encode(mx.random.normal(shape), mx.random.normal(shape), layout)
    pool = PagePool(layout, kv_heads)
    pool.allocate(ENCODED_BLOCKS)
    pool.write((tuple(range(ENCODED_BLOCKS * size)),), rows[None])
    return pool.pages[mx.random.randint(0, ENCODED_BLOCKS, (num_blocks,))]


def bench_decode(
    shape: Shape, head_dim: int, config: TurboQuantConfig, bandwidth: float
) -> dict[str, float | None]:
    """Time one shape on all sides.

    Args:
        shape: sequences, tokens, heads.
        head_dim: elements of a key and of a value.
        config: widths.
        bandwidth: bytes a second of a copy, to compare with.

    Returns:
        The shape; ``kernel_us`` and ``sdpa_us`` of a call with the host's part hidden, their
        ratio ``speedup``; ``mlx_8bit_us`` and ``mlx_4bit_us``, None where MLX cannot; ``gbps``
        of compressed bytes and its share of the copy's; ``rel_error``; wall time of a call that
        is evaluated at once (``call_us``) and of one in a chain (``chain_us``), with ``sdpa_``
        for dense attention.
    """
    cache = PagedCache(shape, PageLayout(config, head_dim))
    rel_error = cache.rel_error()
    ours = _times(cache.attend, shape, head_dim)
    gbps = cache.row_bytes / ours["kernel_us"] / 1e3
    del cache
    clock.release()
    sdpa = _times(_dense(shape, head_dim), shape, head_dim)
    clock.release()
    quantised = {bits: _quantised_time(shape, head_dim, bits) for bits in caches.MLX_BITS.values()}
    clock.release()
    return {
        **asdict(shape),
        "kernel_us": ours["kernel_us"],
        "sdpa_us": sdpa["kernel_us"],
        **{f"mlx_{bits}bit_us": microseconds for bits, microseconds in quantised.items()},
        "speedup": sdpa["kernel_us"] / ours["kernel_us"],
        "gbps": gbps,
        "copy_share": gbps * 1e9 / bandwidth,
        "rel_error": rel_error,
        "call_us": ours["call_us"],
        "sdpa_call_us": sdpa["call_us"],
        "chain_us": ours["chain_us"],
        "sdpa_chain_us": sdpa["chain_us"],
    }


def _random(shape: Shape, head_dim: int) -> list[mx.array]:
    """Keys and values in bf16."""
    size = (shape.batch, shape.kv_heads, shape.context, head_dim)
    return [mx.random.normal(size, dtype=mx.bfloat16) for _ in range(2)]


def _dense(shape: Shape, head_dim: int) -> Attend:
    """Attention over random bf16 keys and values, as a function of the queries."""
    keys, values = _random(shape, head_dim)
    mx.eval(keys, values)
    return lambda queries: mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=head_dim**-0.5
    )


def _quantised_time(shape: Shape, head_dim: int, bits: int) -> float | None:
    """Microseconds of a call over mlx_lm's quantised cache, or None where MLX cannot run it."""
    group = MLX_GROUP
    try:
        keys, values = (mx.quantize(x, group, bits) for x in _random(shape, head_dim))
        mx.eval(keys, values)

        def attend(queries: mx.array) -> mx.array:
            scale = head_dim**-0.5
            # It scales its queries in place, which are used again here.
            return quantized_scaled_dot_product_attention(
                queries + 0, keys, values, scale, None, group, bits
            )

        return 1e6 * clock.kernel_time(attend, _queries(shape, head_dim))
    except (ValueError, RuntimeError):
        return None


def _queries(shape: Shape, head_dim: int) -> list[mx.array]:
    """Queries in bf16 for as many calls as are timed together."""
    size = (shape.batch, shape.heads, 1, head_dim)
    calls = 32 if clock.gpu_backend() else 2
    return [mx.random.normal(size, dtype=mx.bfloat16) for _ in range(calls)]


def _times(attend: Attend, shape: Shape, head_dim: int) -> dict[str, float]:
    """Microseconds of ``attend`` on bf16 queries, in the three ways of ``bench_decode``."""
    queries = _queries(shape, head_dim)
    return {
        "kernel_us": 1e6 * clock.kernel_time(attend, queries),
        "call_us": 1e6 * clock.wall(lambda: attend(queries[0])),
        "chain_us": 1e6 * clock.chain_time(attend, queries[0], len(queries)),
    }
