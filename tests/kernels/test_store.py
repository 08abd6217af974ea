"""The encode kernel with a centre is codec.encode with it; its tail is tail.pushed."""

import centres
import mlx.core as mx
import pytest

from vllm_metal_tq import codec
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.kernels.encode import encode, store
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.tail import TAIL, pushed, sources

SAME_ROWS, SAME_FLAGS = 0.93, 0.98  # a few are near a tie, see test_encode.py


def layout(head_dim=64, widths=(4, 4)):
    return PageLayout(TurboQuantConfig(*widths), head_dim)


def same(rows, oracle, page):
    equal = (rows == oracle).all(axis=-1).astype(mx.float32).mean().item()
    flags = (x[..., page.code_bytes + 1 :: 2] >= 128 for x in (rows, oracle))
    return equal, mx.equal(*flags).astype(mx.float32).mean().item()


@pytest.mark.parametrize("position", [0, 131_071, 1_000_000])
@pytest.mark.parametrize(
    ("head_dim", "widths", "size", "dtype"),
    [
        (64, (4, 4), 1, mx.float32),
        (80, (3, 5), 10, mx.bfloat16),
        (96, (4, 4), 2, mx.float16),
        (128, (4, 4), 100, mx.float32),
        (256, (2, 3), 2, mx.bfloat16),
    ],
)
def test_centred_rows_are_the_codecs(head_dim, widths, size, dtype, position, execute):
    page, centre = layout(head_dim, widths), centres.random(3, head_dim, size)
    keys, values = (x.astype(dtype) for x in centres.typical(centre, 40, position))
    keys[:, ::4] *= 0.01  # far from the mean: these get no flag
    start, positions = mx.array([position, 7], mx.int32), mx.arange(position, position + 40)
    rows = encode(keys, values, page, execute, centre=centre, start=start)
    oracle = codec.encode(keys, values, page, centre, positions)
    equal, flags = same(rows, oracle, page)
    assert equal >= SAME_ROWS
    assert flags >= SAME_FLAGS
    k_flags, v_flags = (codec_flags(oracle, page, i) for i in range(2))
    assert 0.1 < k_flags.mean().item() < 0.9  # both ways were taken
    assert v_flags.mean().item() > 0.1


def codec_flags(rows, page, which):
    return (rows[..., page.code_bytes + 1 + 2 * which] >= 128).astype(mx.float32)


def test_the_first_tokens_of_a_limited_cache_keep_their_mean(execute):
    page, centre = layout(), centres.random(2, 64)
    keys, values = centres.typical(centre, 30)
    rows = encode(keys, values, page, execute, centre=centre, uncentred=16)
    plain = codec.encode(keys, values, page, centre.without_mu, mx.arange(30))
    centred = codec.encode(keys, values, page, centre, mx.arange(30))
    oracle = mx.concatenate([plain[:, :16], centred[:, 16:]], axis=1)
    assert same(rows, oracle, page)[0] >= SAME_ROWS
    flags = codec_flags(rows, page, 0)
    assert mx.array_equal(flags, codec_flags(oracle, page, 0))
    assert flags[:, :16].max().item() == 0
    assert flags[:, 16].min().item() == 1


def test_a_nan_reaches_the_scale_of_its_own_vector(execute):
    page, centre = layout(), centres.random(2, 64)
    keys, values = centres.typical(centre, 9)
    keys[0, 5, 7] = values[1, 2, 3] = mx.nan
    rows = encode(keys, values, page, execute, centre=centre)
    scales = rows[..., page.code_bytes :].view(mx.float16)
    assert mx.isnan(scales).tolist() == [
        [[(head, token, half) in ((0, 5, 0), (1, 2, 1)) for half in range(2)] for token in range(9)]
        for head in range(2)
    ]


@pytest.mark.parametrize("indices", [(0,), (31,), (5, 1000), (7, 0, 38, 31, 64)])
@pytest.mark.parametrize("length", [1, 8, 32, 33, 100])
@pytest.mark.parametrize(("heads", "head_dim", "dtype"), [(3, 64, mx.float16), (1, 80, mx.float32)])
def test_tails_take_up_the_last_tokens(heads, head_dim, dtype, length, indices, execute):
    page, batch = layout(head_dim), len(indices)
    shapes = [*[(batch, heads, length, head_dim)] * 2, *[(batch, heads, TAIL, head_dim)] * 2]
    keys, values, *tail = (
        mx.random.normal(s, key=mx.random.key(i)).astype(dtype) for i, s in enumerate(shapes)
    )
    starts = mx.array([[0, index] for index in indices], mx.int32)
    rows, *found = store(keys, values, tail, page, starts=starts, execute=execute)
    source = sources(indices, length)
    expected = [pushed(*x, source) for x in zip(tail, (keys, values), strict=True)]
    assert all(mx.array_equal(*x) for x in zip(found, expected, strict=True))
    for i in range(batch):
        assert mx.array_equal(rows[i], encode(keys[i], values[i], page, execute))


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("places", [(70, 3), (0, 131_071, 9, 40, 1_000_000)])
def test_each_sequence_has_positions_of_its_own(places, length, execute):
    page, centre = layout(), centres.random(2, 64)
    pairs = [centres.typical(centre, length, first, first) for first in places]
    keys, values = (mx.stack(x) for x in zip(*pairs, strict=True))
    tail = (mx.zeros((len(places), 2, TAIL, 64)),) * 2
    starts = mx.array([[first, 0] for first in places], mx.int32)
    options = {"centre": centre, "uncentred": 1, "execute": execute}
    rows, *_ = store(keys, values, tail, page, starts=starts, **options)
    for i, pair in enumerate(pairs):
        assert mx.array_equal(rows[i], encode(*pair, page, start=starts[i], **options))
