"""The kernels at the limits of their arithmetic, beside attention in float64."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.reference import Case, Centring, float64

from vllm_metal_tq import codec
from vllm_metal_tq.config import T2, T3
from vllm_metal_tq.kernels import decode as kernel
from vllm_metal_tq.kernels.decode import decode

BOUND = 5e-4
COUNT, DIM = 160, 64

both_codes = pytest.mark.parametrize("widths", [(4, 4), (T2, T3)], ids=["scalar", "trellis"])


@pytest.fixture(params=["mma", "fma"])
def variant(request):
    return request.param


def case(keys=None, values=None, queries=None, **options):
    """One sequence; each of the three random where it is not given as ``(COUNT, DIM)``."""
    made = Case([COUNT], head_dim=DIM, dtype=mx.float32, **{"heads": (2, 1)} | options)
    rng = np.random.default_rng(1)
    keys, values = (rng.normal(size=(COUNT, DIM)) if x is None else x for x in (keys, values))
    rows = codec.encode(*(mx.array(x[None], mx.float32) for x in (keys, values)), made.layout)
    places = np.arange(COUNT)
    slots = np.array(made.block_table)[0, places // 16] * 16 + places % 16
    made.pool.write((tuple(slots.tolist()),), rows[None])
    if queries is not None:
        made.queries = mx.broadcast_to(mx.array(queries, mx.float32), made.queries.shape)
    return made


def signs():
    return np.sign(np.random.default_rng(2).normal(size=(COUNT, DIM)))


@both_codes
@pytest.mark.parametrize("size", [1e-3, 1.0, 700.0, 20_000.0])
def test_weights_times_scales_beyond_fp16(size, widths, variant, execute, monkeypatch):
    """Until the maximum is renewed weights are up to 64, and values up to 65504 times theirs."""
    for name in ("_splits", "_simdgroups"):  # all tokens for one SIMD-group
        monkeypatch.setattr(kernel, name, lambda *_: 1)
    later = np.arange(COUNT)[:, None] >= COUNT // 2
    logit = 4 * np.log(2)  # a weight of 16: the maximum is renewed above 64
    keys = np.full(DIM, logit / DIM**0.5) * later
    made = case(keys, size * signs(), np.ones(DIM), heads=(8, 1), widths=widths)
    assert made.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("keys", [None, np.zeros((COUNT, DIM))])
def test_equal_logits(keys, variant, execute):
    made = case(keys, queries=np.zeros(DIM) if keys is None else None)
    assert made.error(decode, variant=variant, execute=execute) < BOUND


@both_codes
def test_values_that_are_zeros(widths, variant, execute):
    made = case(values=np.zeros((COUNT, DIM)), widths=widths)
    assert not np.array(made.attended(decode, variant=variant, execute=execute)).any()


@pytest.mark.parametrize("loud", [1e2, 1e4])
def test_logits_far_beyond_fp16(loud, variant, execute):
    """One token has all the weight: the largest logit, by far more than queries are rounded by."""
    keys = np.random.default_rng(1).normal(size=(COUNT, DIM)) * 100
    keys[77] = 300
    made = case(keys, queries=np.full(DIM, loud))
    assert made.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_that_is_no_number_shows(bad, variant, execute):
    made = case()
    pages = np.array(made.pool.pages)
    block = int(made.block_table[0, 3])
    pages[block, 0, -4 * 16 :].view(np.float16)[5 * 2] = bad  # the key of token 3 * 16 + 5
    made.pool.adopt(mx.array(pages), [])
    out = float64(made.attended(decode, variant=variant, execute=execute))
    assert not np.isfinite(out).all()


@pytest.mark.parametrize("shift", [2**20 - 1, 10**6 + 7, 2**24 + 1, 2**30 + 3])
def test_positions_far_from_zero(shift, variant, execute):
    options = {"heads": (2, 1), "head_dim": DIM, "dtype": mx.float32}
    made = Case([COUNT], centring=Centring(shift=(shift,)), **options)
    assert made.error(decode, variant=variant, execute=execute) < BOUND
