import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq.rotation import MAX_HEAD_DIM, MIN_HEAD_DIM, rotate, rotated_dim, signs, unrotate

HEAD_DIMS = (64, 80, 96, 128, 256)


def normal(*shape):
    return mx.random.normal(shape, key=mx.random.key(0))


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 72, 100, 112, 192, 224, 512])
def test_unrotate_undoes_rotate(head_dim):
    x = normal(5, head_dim)
    assert mx.abs(unrotate(rotate(x), head_dim) - x).max().item() < 1e-5


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 72])
def test_rotation_keeps_inner_products(head_dim):
    q, k = normal(7, head_dim), normal(9, head_dim)
    error = rotate(q) @ rotate(k).T - q @ k.T
    assert mx.abs(error).max().item() < 1e-4


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 224, 256, 512])
def test_the_head_dims_of_most_models_are_rotated_without_padding(head_dim):
    assert rotated_dim(head_dim) == head_dim


def test_every_size_is_one_that_mlx_transforms():
    for head_dim in range(MIN_HEAD_DIM, MAX_HEAD_DIM + 1):
        size = rotated_dim(head_dim)
        assert size >= head_dim
        assert size % 32 == 0
        odd = size
        while odd % 2 == 0:
            odd //= 2
        assert odd in (1, 3, 5, 7)  # 12 = 3*4, 20 = 5*4, 28 = 7*4


def test_padding_is_as_small_as_can_be():
    assert [rotated_dim(d) for d in (8, 33, 65, 80, 100, 129, 257)] == [
        32,
        64,
        96,
        96,
        128,
        160,
        320,
    ]


def test_one_large_element_is_spread_over_all():
    spike = mx.zeros((128,))
    spike[3] = 1.0
    assert np.allclose(np.abs(rotate(spike)), 128**-0.5)


def test_signs_are_the_same_everywhere():
    # Changing them would make every saved cache unreadable.
    assert signs(16).tolist() == [-1, 1, -1, -1, 1, -1, 1, -1, 1, 1, -1, -1, -1, 1, 1, 1]
    assert signs(256)[:16].tolist() == signs(16).tolist()


def test_signs_are_balanced():
    assert abs(signs(1024).sum().item()) < 4 * 1024**0.5


def test_the_result_is_float32_for_any_float_dtype():
    x = normal(2, 64)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        assert rotate(x.astype(dtype)).dtype == mx.float32
