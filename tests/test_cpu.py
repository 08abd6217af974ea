import centres
import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq import attention, codec, cpu
from vllm_metal_tq.config import WIDTHS, TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import BlockTable, PagePool


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def both(config, head_dim, past_length, *, sinks=None, dtype=mx.float32, centre=None, recent=1):
    """The reference's output and the output from the pages, for two KV heads of a group of 3."""
    layout = PageLayout(config, head_dim)
    table = BlockTable(PagePool(layout, 2))
    shift = 32

    def append(start, count, seed):
        keys, values = (normal(2, count, head_dim, seed=seed + i) for i in (0, 1))
        if centre:
            keys, values = centres.typical(centre, count, start, seed)
        positions = mx.arange(start, start + count)
        table.append(codec.encode(keys, values, layout, centre, positions))

    table.append(mx.zeros((2, 40, layout.row_bytes), mx.uint8))
    append(40, past_length, 1)
    table.evict(table.oldest_but_first(shift))  # the blocks are not in order any more
    append(40 + past_length, 20, 3)
    past_length = table.num_tokens - 1  # the last token's page is in use, but not its own
    q = normal(1, 6, 1, head_dim, seed=5).astype(dtype)
    k, v = (normal(1, 2, recent, head_dim, seed=i).astype(dtype) for i in (6, 7))
    pages = table.read(past_length)
    slots = pages.shape[1] * config.block_size
    past = codec.decode(pages, layout, centre, mx.arange(shift, shift + slots))
    past = [x.flatten(1, 2)[None, :, :past_length].astype(dtype) for x in past]
    past = [mx.pad(x, [(0, 0), (0, 0), (0, recent), (0, 0)]) for x in past]
    expected = attention.attend(q, k, v, past, scale=0.2, sinks=sinks, centre=centre)
    where = table.pool.pages, table.blocks, past_length, layout
    options = {"scale": 0.2, "sinks": sinks, "centre": centre, "shift": shift}
    got = cpu.attend_token(q, k, v, *where, **options)
    assert got.dtype == dtype
    return tuple(np.array(x.astype(mx.float32)) for x in (expected, got))


@pytest.mark.parametrize("k_width", WIDTHS)
@pytest.mark.parametrize("v_width", WIDTHS)
def test_every_width_gives_what_decompressing_gives(k_width, v_width):
    expected, got = both(TurboQuantConfig(k_width, v_width), 64, 50)
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


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("past_length", [30, 2 * cpu.SLICE + 5])
def test_means_are_added_back(head_dim, past_length):
    centre = centres.random(2, head_dim, size=1.0)  # flags differ from token to token
    expected, got = both(TurboQuantConfig(4, 4), head_dim, past_length, centre=centre, recent=9)
    assert np.abs(got - expected).max() < 3e-5


@pytest.mark.parametrize("recent", [1, 2, 32])
def test_recent_tokens_are_attended_as_they_came(recent):
    expected, got = both(TurboQuantConfig(4, 4), 64, 50, recent=recent)
    assert np.abs(got - expected).max() < 1e-5
