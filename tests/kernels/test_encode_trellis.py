"""Trellis codes of the encode kernel are codec.encode's up to rounding."""

import centres
import mlx.core as mx
import numpy as np
import pytest
from rows import decoded

from vllm_metal_tq import codec
from vllm_metal_tq.config import T2, T3, TRELLIS_WIDTHS, TurboQuantConfig
from vllm_metal_tq.kernels.encode import encode, store
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.rotation import rotate, unrotate
from vllm_metal_tq.tail import TAIL, pushed, sources
from vllm_metal_tq.trellis import STATES

# Sums of costs are halves here: of ways that are nearly as good as each other another one may win,
# and around the seam lead to one where a short vector costs more, or less.
SAME_ROWS = {320: 0.8, 512: 0.8}  # longer ones have more ties; 0.9 of others
EXCESS = 2e-3
WORST = 1.5


def layout(k_width=T3, v_width=T3, head_dim=64):
    return PageLayout(TurboQuantConfig(k_width, v_width), head_dim)


def normal(*shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def scales(rows, page):
    return np.array(rows)[..., page.code_bytes :].copy().view(np.float16).astype(np.float32)


def same(rows, oracle):
    return (rows == oracle).all(axis=-1).astype(mx.float32).mean().item()


def square_errors(rows, page, keys, values):
    """Of each key, and of each value."""
    found = decoded(rows, page)
    return [
        np.array(mx.square(x - rotate(y)).sum(axis=-1))
        for x, y in zip(found, (keys, values), strict=True)
    ]


def assert_as_near(rows, oracle, page, keys, values):
    found, best = (square_errors(x, page, keys, values) for x in (rows, oracle))
    for x, y in zip(found, best, strict=True):
        assert x.sum() < (1 + EXCESS) * y.sum()
        assert (x <= WORST * y).all()


@pytest.mark.parametrize(
    ("k_width", "v_width", "head_dim", "dtype"),
    [
        (T3, T3, 32, mx.float32),
        (T3, T3, 64, mx.bfloat16),
        (T2, T2, 64, mx.float16),
        (T2, T3, 96, mx.bfloat16),
        (T3, T2, 128, mx.bfloat16),
        (T2, 4, 128, mx.float32),
        (3, T3, 80, mx.float32),
        (T3, T3, 224, mx.float16),
        (T2, T2, 256, mx.float32),
        (T3, T2, 320, mx.bfloat16),
        (T2, T3, 512, mx.float32),
    ],
)
def test_rows_are_the_codecs_up_to_rounding(k_width, v_width, head_dim, dtype, execute):
    page = layout(k_width, v_width, head_dim)
    tokens = max(4096 // head_dim, 29)
    keys, values = normal(2, 2, tokens, head_dim, seed=k_width, dtype=dtype) * mx.array(0.05, dtype)
    rows, oracle = encode(keys, values, page, execute), codec.encode(keys, values, page)
    trellis = [width in TRELLIS_WIDTHS for width in (k_width, v_width)]
    found, wanted = (scales(x, page)[..., trellis] for x in (rows, oracle))
    assert np.allclose(found, wanted, rtol=2**-10)  # the next half
    assert same(rows, oracle) > SAME_ROWS.get(head_dim, 0.9)
    assert_as_near(rows, oracle, page, keys, values)


@pytest.mark.parametrize("widths", [(T3, 4), (4, T2)])
def test_the_scalar_half_of_a_row_is_that_of_scalar_rows(widths, execute):
    page, scalar = layout(*widths), layout(4, 4)
    keys, values = normal(2, 2, 13, 64)
    rows, wanted = (np.array(encode(keys, values, x, execute)) for x in (page, scalar))
    if widths[0] == 4:
        codes, scale = slice(0, 32), slice(-4, -2)
    else:
        codes, scale = slice(-36, -4), slice(-2, None)
    assert np.array_equal(rows[..., codes], wanted[..., codes])
    assert np.array_equal(rows[..., scale], wanted[..., scale])


def test_vectors_with_outliers(execute):
    page = layout(T2, T3, 128)
    keys, values = normal(2, 1, 40, 128) ** 5
    keys[..., 3] *= 100
    values[:, :10] = mx.eye(128)[:10]  # rotated: all elements of one size
    rows, oracle = encode(keys, values, page, execute), codec.encode(keys, values, page)
    assert_as_near(rows, oracle, page, keys, values)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_codes_do_not_depend_on_the_length(size, execute):
    """Sizes are powers of two: nothing else is rounded."""
    page, size = layout(T2, T3), 2.0 ** np.round(np.log2(size))
    keys, values = normal(2, 1, 9, 64)
    rows = np.array(encode(keys, values, page, execute))
    scaled = np.array(encode(keys * size, values * size, page, execute))
    assert np.array_equal(rows[..., : page.code_bytes], scaled[..., : page.code_bytes])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_rows_do_not_depend_on_how_many_lanes_share_a_vector(head_dim, execute):
    page = layout(T2, T3, head_dim)
    keys, values = normal(2, 1, 21, head_dim)
    one_element = mx.eye(head_dim)[:: head_dim // 8]  # many ways cost the same
    keys[:, :8] = unrotate(one_element, head_dim)
    few, many = (encode(keys, values, page, execute, many=x) for x in (False, True))
    assert mx.array_equal(few, many)


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_row_does_not_depend_on_its_neighbours(num_tokens, head_dim, execute):
    page = layout(T3, T2, head_dim)
    keys, values = normal(2, 1, 33, head_dim)
    rows = encode(keys, values, page, execute)
    alone = encode(keys[:, 4 : 4 + num_tokens], values[:, 4 : 4 + num_tokens], page, execute)
    assert mx.array_equal(alone, rows[:, 4 : 4 + num_tokens])


def test_a_turned_vector_is_as_near(execute):
    """No place of the ring is worse off than another: the seam costs nothing."""
    page = layout(T2, T2)
    y = normal(1, 200, 64)
    errors = []
    for turn in (0, 7, 32):
        turned = mx.roll(y, turn, axis=-1)
        rows = encode(turned, turned, page, execute)
        found = decoded(rows, page)[0] - rotate(turned)
        errors.append(np.square(np.array(found)).mean(axis=(0, 1)))
    by_place = np.mean(errors, axis=0)
    assert by_place[:6].mean() < 1.1 * by_place.mean()
    assert by_place[-6:].mean() < 1.1 * by_place.mean()


def test_zero_vectors_decode_to_zeros(execute):
    zeros = mx.zeros((1, 9, 64))
    rows = encode(zeros, zeros, layout(), execute)
    assert all(mx.array_equal(x, zeros) for x in decoded(rows, layout()))


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e7, 1e30])
def test_what_cannot_be_encoded_gets_a_scale_that_is_nan(bad, which, execute):
    inputs = {"keys": normal(2, 5, 64), "values": normal(2, 5, 64)}
    good = encode(**inputs, layout=layout(), execute=execute)
    inputs[which][1, 2, 7] = bad
    rows = encode(**inputs, layout=layout(), execute=execute)
    wrong = np.zeros((2, 5, 2), bool)
    wrong[1, 2, int(which == "values")] = True
    assert np.array_equal(np.isnan(scales(rows, layout())), wrong)
    others = np.array(good != rows)[~wrong.any(axis=-1)]
    assert not others.any()  # the two vectors of a pair have nothing in common


@pytest.mark.parametrize(("widths", "head_dim"), [((T3, T3), 64), ((T2, 4), 80), ((5, T2), 128)])
def test_centred_rows_are_the_codecs_up_to_rounding(widths, head_dim, execute):
    page, position = layout(*widths, head_dim), 1000
    centre = centres.random(2, head_dim, 2.0)
    keys, values = centres.typical(centre, 40, position)
    keys[:, ::4] *= 0.01  # far from the mean: these get no flag
    start, positions = mx.array([position, 7], mx.int32), mx.arange(position, position + 40)
    rows = encode(keys, values, page, execute, centre=centre, start=start)
    oracle = codec.encode(keys, values, page, centre, positions)
    found, wanted = (np.signbit(scales(x, page)) for x in (rows, oracle))
    assert (found == wanted).mean() > 0.98
    assert 0.1 < found[..., 0].mean() < 0.9  # both ways were taken
    assert found[..., 1].any()
    assert same(rows, oracle) > 0.9


@pytest.mark.parametrize("length", [1, 9])
def test_sequences_and_tails(length, execute):
    """Tails are pushed beside, and each sequence has a position of its own."""
    page, centre = layout(T3, T2), centres.random(2, 64)
    places = (0, 131_071, 40)
    pairs = [centres.typical(centre, length, first, first) for first in places]
    fresh = tuple(mx.stack(x) for x in zip(*pairs, strict=True))
    tail = tuple(normal(len(places), 2, TAIL, 64, seed=i) for i in range(2))
    starts = mx.array([[first, first] for first in places], mx.int32)
    options = {"centre": centre, "uncentred": 1, "execute": execute}
    rows, *found = store(*fresh, tail, page, starts=starts, **options)
    source = sources(places, length)
    for ring, *parts in zip(found, tail, fresh, strict=True):
        assert mx.array_equal(ring, pushed(*parts, source))
    for i, pair in enumerate(pairs):
        assert mx.array_equal(rows[i], encode(*pair, page, start=starts[i], **options))


def test_every_state_is_a_seam_somewhere(execute):
    """Of many vectors, the c's before the first element are all there are."""
    page = layout(T2, T2, 32)
    keys, values = normal(2, 1, 400, 32)
    rows = np.array(encode(keys, values, page, execute))
    last = np.concatenate([rows[0, :, 3], rows[0, :, 3 + 8]])  # of the planes c
    assert len(set((last >> 2).tolist())) == STATES
