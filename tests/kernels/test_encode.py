"""The encode kernel is codec.encode up to rounding."""

import mlx.core as mx
import numpy as np
import pytest
from rows import decoded

from vllm_metal_tq import codec
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.kernels.encode import encode
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.rotation import rotate, unrotate

# A vector whose two best steps are nearly as good as each other may get the second best, so a few
# rows differ, and square errors are a little above the oracle's: 1e-4 in the mean, more where the
# vectors are as few as here. Errors of 8-bit keys are the least certain in half precision.
EXCESS = 1e-3
SAME_ROWS = {2: 0.97, 3: 0.97, 4: 0.95, 5: 0.95, 6: 0.95, 8: 0.9}


def layout(k_width=4, v_width=4, head_dim=64):
    return PageLayout(TurboQuantConfig(k_width, v_width), head_dim)


def normal(*shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def square_error(rows, page, keys, values):
    found = decoded(rows, page)
    return [
        (x - rotate(y)).square().sum().item() for x, y in zip(found, (keys, values), strict=True)
    ]


@pytest.mark.parametrize(
    ("k_width", "v_width", "head_dim", "dtype"),
    [
        (2, 8, 32, mx.float32),
        (3, 5, 32, mx.bfloat16),
        (8, 3, 64, mx.bfloat16),
        (5, 5, 64, mx.float16),
        (3, 5, 96, mx.float32),
        (4, 4, 128, mx.bfloat16),
        (6, 6, 128, mx.float16),
        (5, 3, 160, mx.float16),
        (5, 5, 192, mx.bfloat16),
        (3, 3, 224, mx.float32),
        (8, 8, 224, mx.float32),
        (4, 2, 256, mx.bfloat16),
        (4, 4, 80, mx.bfloat16),
        (6, 2, 120, mx.float32),
        (3, 3, 320, mx.bfloat16),
        (4, 4, 512, mx.bfloat16),
    ],
)
def test_encode_is_the_codecs_up_to_rounding(k_width, v_width, head_dim, dtype, execute):
    page = layout(k_width, v_width, head_dim)
    keys, values = normal(2, 2, 61, head_dim, seed=k_width, dtype=dtype) * mx.array(0.05, dtype)
    rows, oracle = encode(keys, values, page, execute), codec.encode(keys, values, page)
    same = (rows == oracle).all(axis=-1).astype(mx.float32).mean().item()
    assert same >= min(SAME_ROWS[k_width], SAME_ROWS[v_width])
    errors = zip(
        square_error(rows, page, keys, values),
        square_error(oracle, page, keys, values),
        strict=True,
    )
    assert all(found <= (1 + EXCESS) * best for found, best in errors)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_vectors_with_outliers(head_dim, execute):
    page = layout(4, 4, head_dim)
    keys, values = normal(2, 1, 40, head_dim) ** 5
    keys[..., 3] *= 100
    values[:, :10] = mx.eye(head_dim)[:10]  # rotated: all elements of one size
    values[:, 10:20] = unrotate(mx.eye(head_dim)[:10], head_dim)  # rotated: one element
    rows, oracle = encode(keys, values, page, execute), codec.encode(keys, values, page)
    found, best = (square_error(x, page, keys, values) for x in (rows, oracle))
    assert all(x <= (1 + EXCESS) * y + 1e-9 for x, y in zip(found, best, strict=True))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_lengths_from_small_to_large(size, execute):
    page = layout(v_width=6)
    keys, values = normal(2, 1, 16, 64) * size
    rows, oracle = encode(keys, values, page, execute), codec.encode(keys, values, page)
    assert (rows == oracle).all(axis=-1).sum().item() >= 15


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_rows_do_not_depend_on_how_many_lanes_share_a_vector(head_dim, execute):
    page = layout(4, 4, head_dim)
    keys, values = normal(2, 1, 150, head_dim)
    few, many = (encode(keys, values, page, execute, many=x) for x in (False, True))
    assert mx.array_equal(few, many)


@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_row_does_not_depend_on_its_neighbours(num_tokens, head_dim, execute):
    page = layout(3, 3, head_dim)
    keys, values = normal(2, 1, 33, head_dim)
    rows = encode(keys, values, page, execute)
    alone = encode(keys[:, 4 : 4 + num_tokens], values[:, 4 : 4 + num_tokens], page, execute)
    assert mx.array_equal(alone, rows[:, 4 : 4 + num_tokens])


def test_elements_that_are_zero_get_the_codecs_codes(execute):
    page = layout()
    keys = mx.eye(64)[None, :32] + mx.eye(64)[None, 32:]  # rotated: half of the elements are 0
    rows, oracle = encode(keys, keys, page, execute), codec.encode(keys, keys, page)
    assert (rotate(keys) == 0).sum().item() == 32 * 32
    assert mx.array_equal(rows[..., : page.code_bytes], oracle[..., : page.code_bytes])


def test_a_vector_that_is_too_long_for_the_lanes_is_refused(execute):
    x = mx.zeros((1, 1, 1024))
    with pytest.raises(ValueError, match="1024 dimensions are too many: encode takes 512"):
        encode(x, x, layout(head_dim=1024), execute)


def test_zero_vectors_decode_to_zeros(execute):
    zeros = mx.zeros((1, 9, 64))
    rows = encode(zeros, zeros, layout(), execute)
    assert all(mx.array_equal(x, zeros) for x in decoded(rows, layout()))


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e7])
def test_what_cannot_be_encoded_gets_a_scale_that_is_nan(bad, which, execute):
    inputs = {"keys": normal(2, 5, 64), "values": normal(2, 5, 64)}
    inputs[which][1, 2, 7] = bad
    rows = np.array(encode(**inputs, layout=layout(), execute=execute))
    scales = rows[..., layout().code_bytes :].copy().view(np.float16)
    wrong = np.zeros((2, 5, 2), bool)
    wrong[1, 2, int(which == "values")] = True
    assert np.array_equal(np.isnan(scales), wrong)
    assert np.isfinite(scales[~wrong]).all()
