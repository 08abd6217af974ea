import mlx.core as mx
import numpy as np
import pytest
from lloyd_max import distortion, lloyd_max

from vllm_metal_tq.codebook import CELL_TERMS, key_codebook, value_codebook
from vllm_metal_tq.config import SCALAR_WIDTHS, WIDTHS


def levels(codebook):
    return np.array(codebook.levels(mx.arange(2**codebook.bits).astype(mx.uint8)), np.float64)


@pytest.mark.parametrize("bits", SCALAR_WIDTHS)
def test_value_levels_are_within_2_1_percent_of_lloyd_max(bits):
    assert distortion(levels(value_codebook(bits))) < 1.021 * distortion(lloyd_max(bits))


@pytest.mark.parametrize("width", WIDTHS)
def test_value_levels_are_half_floats_but_for_one_factor(width):
    codebook = value_codebook(width)
    halves = levels(codebook).astype(np.float32) / np.float32(codebook.coefficients[0])
    assert np.abs(halves - halves.astype(np.float16)).max() < 1e-6


def test_the_oracle_agrees_with_published_distortions():
    # Max 1960, table I, at 2, 4, 8 and 16 levels.
    published = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
    for bits, value in published.items():
        assert distortion(lloyd_max(bits)) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("codebook_of", "bits", "cells"),
    [
        *((key_codebook, bits, 0.0) for bits in SCALAR_WIDTHS),
        *((value_codebook, bits, 0.01) for bits in SCALAR_WIDTHS[:-1]),
        (value_codebook, 8, 0.05),
    ],
)
def test_codes_are_the_nearest_levels(codebook_of, bits, cells):
    """Up to a share of a cell, near where two of them meet."""
    codebook = codebook_of(bits)
    x = 3 * mx.random.normal((4096,), key=mx.random.key(bits))
    nearest = np.abs(np.array(x)[:, None] - levels(codebook)).argmin(axis=1)
    codes = np.array(codebook.codes(x))
    tie = np.abs(np.array(x) - levels(codebook)[codes]) - np.abs(
        np.array(x) - levels(codebook)[nearest]
    )
    size = np.gradient(levels(codebook))[codes]
    assert codes.dtype == np.uint8
    assert (np.abs(tie) <= 2 * cells * size + 1e-5).all()


@pytest.mark.parametrize("bits", SCALAR_WIDTHS)
def test_cells_of_kernels_are_the_codes(bits):
    """Beyond the last boundary too, as far as the largest element of a vector may lie."""
    codebook = value_codebook(bits)
    x = np.linspace(0, 1.2 * codebook.largest, 4001)
    cells = x * np.polynomial.Polynomial(codebook.cell_polynomial(CELL_TERMS[bits]))(
        x * x - codebook.cell_centre
    )
    codes = np.array(codebook.codes(mx.array(x[1:].astype(np.float32)))).astype(int)
    found = np.minimum(np.floor(cells[1:]), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
    off = np.abs(cells[1:] - np.round(cells[1:])) < 1e-3  # float32 may round to either side
    assert np.array_equal(codes[~off], found[~off])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("codebook_of", [key_codebook, value_codebook])
def test_levels_rise_and_are_symmetric(codebook_of, width):
    x = levels(codebook_of(width))
    assert (np.diff(x) > 0).all()
    assert np.allclose(x, -x[::-1])


@pytest.mark.parametrize("bits", SCALAR_WIDTHS)
@pytest.mark.parametrize("codebook_of", [key_codebook, value_codebook])
def test_the_codes_of_levels_are_themselves(codebook_of, bits):
    codebook = codebook_of(bits)
    codes = mx.arange(2**bits).astype(mx.uint8)
    assert mx.array_equal(codebook.codes(codebook.levels(codes)), codes)
