"""What TurboQuant (arXiv:2504.19874) proves, checked on this project's rotation and codebooks."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from lloyd_max import distortion, lloyd_max

from vllm_metal_tq.rotation import rotate

DIM = 256


def unit_vectors(count, dim=DIM, seed=0):
    x = mx.random.normal((count, dim), key=mx.random.key(seed))
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def nearest(y, levels):
    return levels[np.abs(y[..., None] - levels).argmin(axis=-1)]


def quantise(x, bits):
    """Q_mse of the paper's algorithm 1: rotate, then Lloyd-Max on coordinates of sqrt(d)*y."""
    y = np.array(rotate(x), np.float64)
    return y, nearest(y * math.sqrt(DIM), lloyd_max(bits)) / math.sqrt(DIM)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_distortion_lies_between_the_bounds(bits, published):
    # Theorem 1 (upper bound and its figures for small b) and theorem 3 (lower bound).
    y, y_hat = quantise(unit_vectors(2000), bits)
    d_mse = ((y - y_hat) ** 2).sum(axis=-1).mean()
    assert 4.0**-bits <= d_mse <= math.sqrt(3) * math.pi / 2 * 4.0**-bits
    # The paper cuts its figures after two or three digits: .03 is .0345, .009 is .0095.
    assert published * 0.97 < d_mse < published * 1.16


def test_distortion_falls_by_four_with_every_bit():
    # High-resolution theory: d(b) * 4^b rises to sqrt(3)*pi/2 and stays.
    scaled = [distortion(lloyd_max(bits)) * 4.0**bits for bits in range(1, 9)]
    assert all(a < b for a, b in itertools.pairwise(scaled))
    assert scaled[-1] == pytest.approx(math.sqrt(3) * math.pi / 2, rel=0.02)


def qjl_estimates(q, x, bits, rng):
    """Inner products <q, x> by Q_prod, the paper's algorithm 2: bits - 1 bits, 1 for the residual.

    The residual r is kept as its norm and the signs of S r, S with normal elements.
    """
    y, y_hat = quantise(x, bits - 1)
    residual = y - y_hat
    projection = rng.standard_normal((DIM, DIM))
    signs = np.sign(residual @ projection.T)
    length = np.linalg.norm(residual, axis=-1, keepdims=True)
    y_hat = y_hat + math.sqrt(math.pi / 2) / DIM * length * (signs @ projection)
    return (np.array(rotate(q), np.float64) * y_hat).sum(axis=-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_qjl_variant_estimates_inner_products_without_bias(bits):
    # Theorem 2: unbiased, variance <= sqrt(3)*pi^2*|q|^2/d * 4^-b. Measured with q = x, where
    # plain quantisation is off by its whole distortion (11.7 % at 2 bits).
    x = unit_vectors(1500, seed=3)
    rng = np.random.default_rng(4)
    estimates = np.concatenate([qjl_estimates(x, x, bits, rng) for _ in range(20)])
    assert abs(estimates.mean() - 1) < 1e-3
    assert estimates.var() <= math.sqrt(3) * math.pi**2 / DIM * 4.0**-bits
    y, y_hat = quantise(x, bits)
    assert 1 - (y * y_hat).sum(axis=-1).mean() > 5e-3
