"""Encoding new tokens and storing them, beside what mlx_lm's caches do with them."""

from __future__ import annotations

import mlx.core as mx

from .. import codec
from ..config import TurboQuantConfig
from ..kernels.encode import encode
from ..layout import PageLayout
from ..pages import BlockTable, PagePool
from ..plan.caches import MLX_GROUP
from . import clock

KV_HEADS = 8
GPU_TOKENS, CPU_TOKENS = [1, 8192], [1, 256]
GPU_CACHE_TOKENS, CPU_CACHE_TOKENS = [4096, 1 << 20], [1024, 1 << 16]


def bf16_bytes(num_tokens: int, head_dim: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    return 4 * KV_HEADS * num_tokens * head_dim


def bench_encode(
    num_tokens: int, head_dim: int, config: TurboQuantConfig, bandwidth: float
) -> dict[str, float | None]:
    """Time the encoding of ``num_tokens`` tokens of 8 KV heads, and what mlx_lm does instead.

    Args:
        num_tokens: tokens of a call.
        head_dim: elements of a key and of a value.
        config: widths.
        bandwidth: bytes a second of a copy, to compare with.

    Returns:
        ``tokens``; ``encode_us`` of a call with the host's part hidden, ``gbps`` of keys and
        values read and rows written in that time, and its share of the copy's;
        ``encode_call_us``, ``bf16_append_call_us`` and ``mlx_4bit_call_us``, wall time of a call
        that is evaluated at once; the last is that of quantising alone, None where MLX cannot.
    """
    layout = PageLayout(config, head_dim)
    calls = (32 if num_tokens <= 64 else 8) if clock.gpu_backend() else 2
    shape = (KV_HEADS, num_tokens, head_dim)

    def random() -> mx.array:
        return mx.random.normal(shape, dtype=mx.bfloat16)

    def call(pair: tuple[mx.array, mx.array]) -> mx.array:
        keys, values = pair
        kernel = encode if clock.gpu_backend() else codec.encode
        return kernel(keys, values, layout)

    inputs = [(random(), random()) for _ in range(calls)]
    seconds = clock.kernel_time(call, inputs)
    moved = sum(x.nbytes for x in inputs[0]) + KV_HEADS * num_tokens * layout.row_bytes
    return {
        "tokens": num_tokens,
        "encode_us": 1e6 * seconds,
        "gbps": moved / seconds / 1e9,
        "copy_share": moved / seconds / bandwidth,
        "encode_call_us": 1e6 * clock.wall(lambda: call(inputs[0])),
        "bf16_append_call_us": 1e6 * _dense_append_time(*inputs[0]),
        "mlx_4bit_call_us": _quantise_time(*inputs[0]),
    }


def _dense_append_time(keys: mx.array, values: mx.array) -> float:
    """Seconds of an append to a cache that has room for it."""
    heads, num_tokens, head_dim = keys.shape
    room = max(2 * num_tokens, GPU_CACHE_TOKENS[0])
    cache = [mx.zeros((heads, room, head_dim), mx.bfloat16) for _ in range(2)]
    mx.eval(cache)

    def append() -> list[mx.array]:
        for part, new in zip(cache, (keys, values), strict=True):
            part[:, num_tokens : 2 * num_tokens] = new
        return cache

    return clock.wall(append)


def _quantise_time(keys: mx.array, values: mx.array) -> float | None:
    """Microseconds of quantising as mlx_lm's 4-bit cache does, or None where MLX cannot."""

    def quantise() -> list[object]:
        return [mx.quantize(x, group_size=MLX_GROUP, bits=4) for x in (keys, values)]

    try:
        return 1e6 * clock.wall(quantise)
    except (ValueError, RuntimeError):
        return None


def bench_append(cache_tokens: int, head_dim: int, config: TurboQuantConfig) -> dict[str, float]:
    """Time the append of one encoded token to pages that hold ``cache_tokens``.

    Returns:
        ``cache_tokens`` and ``cache_bytes``; ``append_us``, wall time of one append; and
        ``extra_bytes``, what memory peaks at above its use: below ``cache_bytes`` nothing was
        copied.
    """
    layout = PageLayout(config, head_dim)
    table = BlockTable(PagePool(layout, KV_HEADS))
    blocks = table.pool.allocate(-(-cache_tokens // config.block_size))
    table.hold(blocks, cache_tokens - 1)  # the last block has room, so the pool does not grow
    row = mx.zeros((KV_HEADS, 1, layout.row_bytes), mx.uint8)
    mx.eval(table.pool.pages, row)

    def append() -> mx.array:
        table.trim(1)
        table.append(row)
        return table.pool.pages

    table.append(row)
    seconds = clock.wall(append)
    return {
        "cache_tokens": cache_tokens,
        "cache_bytes": table.pool.pages.nbytes,
        "append_us": 1e6 * seconds,
        "extra_bytes": clock.extra_memory(append),
    }
