import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq import attention, codec, cpu
from vllm_metal_tq.config import WIDTHS, TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import BlockTable, PagePool


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def both(config, head_dim, past_length, group=3, sinks=None, dtype=mx.float32):
    """The reference's output and the output from the pages, for two KV heads."""
    layout = PageLayout(config, head_dim)
    table = BlockTable(PagePool(layout, 2))
    table.append(mx.zeros((2, 40, layout.row_bytes), mx.uint8))
    table.append(codec.encode(*(normal(2, past_length, head_dim, seed=i) for i in (1, 2)), layout))
    table.evict(32)  # the blocks are not in order any more
    table.append(codec.encode(*(normal(2, 20, head_dim, seed=i) for i in (3, 4)), layout))
    past_length = table.num_tokens - 1  # the last token's page is in use, but not its own
    q = normal(1, 2 * group, 1, head_dim, seed=5).astype(dtype)
    k, v = (normal(1, 2, 1, head_dim, seed=i).astype(dtype) for i in (6, 7))
    past = codec.decode(table.read(past_length), layout)
    past = [x.flatten(1, 2)[None, :, :past_length] for x in past]
    expected = attention.attend(q, k, v, past, scale=0.2, sinks=sinks)
    got = cpu.attend_token(
        q, k, v, table.pool.pages, table.blocks, past_length, layout, scale=0.2, sinks=sinks
    )
    assert got.dtype == dtype
    return tuple(np.array(x.astype(mx.float32)) for x in (expected, got))


@pytest.mark.parametrize("k_bits", WIDTHS)
@pytest.mark.parametrize("v_bits", WIDTHS)
def test_every_width_gives_what_decompressing_gives(k_bits, v_bits):
    expected, got = both(TurboQuantConfig(k_bits, v_bits), 64, 50)
    assert np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("past_length", [30, cpu.SLICE, 2 * cpu.SLICE + 5])
def test_slices_join_seamlessly(head_dim, block_size, past_length):
    expected, got = both(TurboQuantConfig(4, 3, block_size), head_dim, past_length)
    assert np.abs(got - expected).max() < 1e-5


def test_sinks_take_their_share():
    sinks = mx.array([0.5, -1.0, 2.0, 0.0, 3.0, 1.0])
    expected, got = both(TurboQuantConfig(4, 4), 64, 50, sinks=sinks)
    assert np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_output_has_the_queries_dtype(dtype):
    expected, got = both(TurboQuantConfig(4, 4), 64, 50, dtype=dtype)
    assert np.abs(got - expected).max() < 0.03
