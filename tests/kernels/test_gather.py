"""The gather kernel is codec.decode, element by element."""

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq import codec
from vllm_metal_tq.config import T2, T3, TurboQuantConfig
from vllm_metal_tq.kernels.gather import gather
from vllm_metal_tq.layout import PageLayout

HEADS = 2
NUM_BLOCKS = 12


def layout(k_width=4, v_width=4, head_dim=64, block_size=16):
    return PageLayout(TurboQuantConfig(k_width, v_width, block_size), head_dim)


def random_pages(page, seed=0):
    """Pages of random codes, and scales in the range of real ones, with random flags."""
    rng = np.random.default_rng(seed)
    shape = (NUM_BLOCKS, HEADS, page.config.block_size)
    pages = rng.integers(0, 256, (NUM_BLOCKS, HEADS, page.page_bytes), np.uint8)
    scales = rng.uniform(0.1, 2, (*shape, 2)).astype(np.float16)
    scales *= rng.choice([-1, 1], scales.shape).astype(np.float16)
    pages[..., page.byte_offsets[:, page.code_bytes :]] = scales.view(np.uint8)
    return mx.array(pages)


def expected(pages, table, num_tokens, page):
    """Keys and values by the oracle, (heads, tokens, dim)."""
    decoded = codec.decode(pages[mx.array(table)], page)
    return [x.swapaxes(0, 1).reshape(HEADS, -1, page.dim)[:, :num_tokens] for x in decoded]


def check(execute, page, table, num_tokens, dtype=mx.float32, room=0):
    pages, blocks = random_pages(page), mx.array(table, mx.int32)
    found = gather(pages, blocks, num_tokens, page, dtype, execute, room=room)
    for x, y in zip(found, expected(pages, table, num_tokens, page), strict=True):
        assert x.dtype == dtype
        assert x.shape[1] == num_tokens + room
        assert mx.array_equal(x[:, :num_tokens], y.astype(dtype))
        assert not x[:, num_tokens:].any()


@pytest.mark.parametrize("room", [1, 40])
def test_room_for_recent_tokens_comes_after_the_others(room, execute):
    check(execute, PageLayout(TurboQuantConfig(4, 3), 64), [3, 0, 5], 37, room=room)


@pytest.mark.parametrize(
    ("k_width", "v_width", "head_dim", "block_size"),
    [
        (2, 8, 32, 16),
        (3, 5, 32, 32),
        (5, 3, 64, 16),
        (6, 2, 64, 32),
        (8, 6, 64, 16),
        (3, 3, 72, 16),
        (5, 5, 96, 32),
        (4, 4, 128, 16),
        (8, 5, 128, 32),
        (6, 6, 160, 16),
        (3, 6, 224, 16),
        (2, 3, 256, 32),
        (5, 8, 320, 16),
        (3, 4, 1024, 32),
        (T2, T3, 32, 16),
        (T3, 6, 64, 32),
        (3, T2, 96, 16),
        (T3, T3, 128, 32),
        (T2, T2, 160, 16),
        (8, T3, 256, 16),
        (T3, 2, 320, 32),
    ],
)
def test_gather_is_decode(k_width, v_width, head_dim, block_size, execute):
    page = layout(k_width, v_width, head_dim, block_size)
    check(execute, page, [5, 0, 11], 2 * block_size + 7)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_elements_are_rounded_to_the_dtype(dtype, execute):
    check(execute, layout(4, 3, 96), [3, 1, 2], 40, dtype)


@pytest.mark.parametrize(
    ("table", "num_tokens"),
    [
        ([7], 1),
        ([7], 16),
        ([2, 7], 17),
        (list(range(10, 1, -1)), 9 * 16 - 1),  # large enough for a pointer of its own kind
    ],
)
def test_any_number_of_tokens(table, num_tokens, execute):
    check(execute, layout(), table, num_tokens)


def test_a_scale_that_is_nan_stays_visible(execute):
    page = layout()
    pages = np.array(random_pages(page))
    pages[3, 1, page.byte_offsets[2, page.code_bytes : page.code_bytes + 2]] = 0, 0x7E
    table = mx.array([3], mx.int32)
    keys, values = gather(mx.array(pages), table, 16, page, mx.float32, execute)
    assert mx.array_equal(mx.isnan(keys).any(axis=-1), mx.arange(32).reshape(2, 16) == 16 + 2)
    assert not mx.isnan(values).any().item()
