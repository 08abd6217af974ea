"""The fp32-FMA decode kernel on simulated SIMD-groups, against attention in float64."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from kernels.reference import Case

from vllm_metal_tq import msl
from vllm_metal_tq.kernels.decode import decode
from vllm_metal_tq.msl.simulate import simulate

pytestmark = pytest.mark.skipif(
    not msl.can_simulate(), reason="needs Linux on x86-64 and clang (pip install ziglang)"
)

fma = partial(decode, variant="fma", execute=simulate)
BOUND = 5e-4  # values and queries are half floats in the kernel


def error(lengths, *, dtype=mx.float32, **case):
    return Case(lengths, dtype=dtype, **case).error(fma)


# ---- The bytes of all widths and dimensions

BYTES = [
    # Head dimensions to 64, where a lane takes half as many dimensions as it does above.
    (2, 3, 64, 16),
    (3, 2, 64, 32),
    (4, 5, 64, 16),
    (5, 4, 64, 32),
    (6, 8, 64, 16),
    (8, 6, 64, 32),
    (3, 5, 32, 16),
    # One unit.
    (2, 8, 128, 16),
    (3, 6, 128, 32),
    (5, 2, 128, 16),
    (6, 5, 128, 32),
    (8, 3, 128, 16),
    (6, 3, 96, 16),
    # Two.
    (8, 5, 160, 32),
    (2, 4, 192, 16),
    (5, 8, 224, 32),
    (3, 3, 256, 16),
    (4, 6, 256, 32),
    # Padded, and to 96 of a rotation that is not a power of two.
    (4, 2, 80, 16),
]


@pytest.mark.parametrize(("k_bits", "v_bits", "head_dim", "block_size"), BYTES)
def test_bytes(k_bits, v_bits, head_dim, block_size):
    case = dict(bits=(k_bits, v_bits), head_dim=head_dim, block_size=block_size)
    assert error([40], heads=(4, 2), **case) < BOUND


# ---- Tokens, columns and rows


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 6, 8])
def test_contexts_and_columns(columns):
    assert error([1, 15, 16, 17, 333], heads=(columns, 1)) < BOUND


@pytest.mark.parametrize("block_size", [16, 32])
def test_several_splits_of_which_some_are_empty(block_size):
    assert error([1100, 5, 31], heads=(2, 1), head_dim=64, block_size=block_size) < BOUND


@pytest.mark.parametrize(
    ("rows", "heads"),
    [
        (2, (2, 2)),
        (3, (2, 1)),
        (4, (1, 1)),
        (8, (2, 2)),
        (5, (3, 1)),  # 15 columns: two groups that meet within a row, one place left over
    ],
)
def test_rows_see_no_token_after_their_own(rows, heads):
    assert error([8, 23, 130], rows=rows, heads=heads) < BOUND


@pytest.mark.parametrize(
    ("rows", "window"), [(1, 1), (1, 16), (1, 60), (1, 1000), (8, 9), (8, 3), (8, 17), (8, 50)]
)
def test_window(rows, window):
    assert error([8, 33, 150], rows=rows, heads=(1, 1), window=window) < BOUND


@pytest.mark.parametrize("rows", [1, 4])
def test_tail_and_sinks(rows):
    # Rows 0 and 1 of 4 are tokens in pages; the first sequence has none there.
    lengths = [30, 47] if rows == 4 else [0, 47]
    case = dict(rows=rows, heads=(4, 2), tail=2, sinks=True)
    assert error(lengths, **case) < BOUND
    assert error(lengths, window=7, **case) < BOUND


# ---- Logits and weights


@pytest.mark.parametrize("columns", [1, 3, 4])
def test_maximum_that_grows(columns):
    # Logits in the tens: sums are rescaled for one column and not for its neighbours. Queries are
    # half floats, whose rounding grows with the logits.
    assert error([333], heads=(columns, 1), loud=8.0) < 2 * BOUND


def test_softcap():
    assert error([90], heads=(3, 1), softcap=5.0, loud=4.0) < BOUND


@pytest.mark.parametrize(("columns", "sparse_v"), [(1, 1e-3), (2, 1e-5)])
def test_sparse_v_keeps_its_bound(columns, sparse_v):
    # Two columns, and so small a fraction that it shows where only one of them is looked at.
    lengths = [333] * 3
    case = dict(heads=(columns, 1), loud=8.0, dtype=mx.float32)
    sparse, dense = Case(lengths, sparse_v=sparse_v, **case), Case(lengths, **case)
    differences = np.array(mx.abs(sparse.attended(fma) - dense.attended(fma))).max(axis=(1, 2, 3))
    assert differences.any() or columns > 1
    for i, difference in enumerate(differences):
        _, values = sparse._tokens(i)
        assert difference <= 333 * sparse_v * np.abs(values).max()


@pytest.mark.parametrize(("dtype", "rounding"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_dtypes(dtype, rounding):
    assert error([50], heads=(3, 1), dtype=dtype) < BOUND + rounding
