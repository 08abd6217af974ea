"""Decoding pages whose keys and values are centred, against float64; and what its tables hold."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.reference import Case, Centring, float64, turned_means

from vllm_metal_tq.config import T2, T3
from vllm_metal_tq.kernels import centre as tables
from vllm_metal_tq.kernels import decode as decode_kernel
from vllm_metal_tq.kernels.decode import decode

BOUND = 5e-4  # as in test_decode.py
F32 = {"dtype": mx.float32}


@pytest.fixture(params=["mma", "fma"])
def variant(request):
    return request.param


@pytest.fixture(params=["many splits", "one split"])
def splits(request, monkeypatch):
    """One split gives a SIMD-group more tokens than it centres at a time."""
    if request.param == "one split":
        monkeypatch.setattr(decode_kernel, "_splits", lambda *_: 1)


FAR = Centring(shift=(131071, 10**6))
BIASED = Centring(mu=10.0, shift=(131071, 10**6))  # as models with large biases of keys have it
PARTIAL = Centring(turned=32, neighbours=True, shift=(10**6, 0))

# head_dim, query heads, KV heads, rows, block_size, lengths, centring
SHAPES = [
    (64, 1, 1, 1, 16, [1, 15], FAR),
    (64, 6, 2, 1, 32, [17, 255], Centring(neighbours=True)),
    (80, 4, 1, 1, 16, [256, 257], PARTIAL),
    (96, 6, 1, 2, 32, [777], BIASED),
    (128, 4, 4, 2, 16, [257, 90], FAR),
    (128, 3, 1, 5, 16, [120, 333], Centring(base=1e4)),
    (128, 8, 1, 1, 16, [777, 16], BIASED),
    (128, 1, 1, 8, 16, [90, 8], FAR),
    (128, 4, 1, 1, 32, [4097], FAR),
    (256, 8, 1, 1, 16, [333, 40], Centring(mu=10.0, base=1e4)),
    (256, 2, 2, 3, 32, [333], FAR),
]


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "rows", "block_size", "lengths", "centring"), SHAPES
)
def test_shapes(
    head_dim, heads, kv_heads, rows, block_size, lengths, centring, variant, splits, execute
):
    shape = dict(head_dim=head_dim, heads=(heads, kv_heads), rows=rows, block_size=block_size)
    case = Case(lengths, centring=centring, **shape, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("mu", [1.0, 10.0, 100.0])
def test_size_of_the_mean(mu, variant, splits, execute):
    # At 100 times the keys' length f is some 1,000, of which float32 leaves 1e-4: relative to two
    # tokens whose logits are close, that is the error of their weights.
    case = Case([333, 333], centring=Centring(mu=mu, shift=(0, 10**6)), **F32)
    assert case.error(decode, variant=variant, execute=execute) < (BOUND if mu < 50 else 2 * BOUND)


@pytest.mark.parametrize("flagged", [0.0, 1.0])
def test_no_token_or_every_token_has_its_mean_left_out(flagged, variant, execute):
    case = Case([90], centring=Centring(flagged=flagged), **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize(
    ("k_width", "v_width"), [(3, 3), (8, 6), (2, 8), (T3, T2), (T2, 8), (4, T3)]
)
def test_widths(k_width, v_width, variant, execute):
    case = Case([90], widths=(k_width, v_width), centring=FAR, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("window", [9, 100])
def test_sliding_window(window, variant, splits, execute):
    case = Case([190, 33], rows=4, window=window, tail=2, centring=FAR, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


def test_soft_cap_sinks_and_tail(variant, execute):
    case = Case([90, 63], softcap=5.0, loud=4.0, sinks=True, tail=7, centring=FAR, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


def test_skipped_values_still_count_for_the_mean(variant, execute):
    # Every weight but the first ones is below the fraction: without the mean nothing would be left.
    options = dict(centring=Centring(mean=100.0, flagged=1.0), heads=(1, 1), loud=0.1, **F32)
    case = Case([333], sparse_v=2.0, **options)
    expected = float64(case.centre.value_mean)[None, :, None]
    got = float64(case.attended(decode, variant=variant, execute=execute))
    assert np.linalg.norm(got - expected) < BOUND * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dtypes(dtype, variant, execute):
    case = Case([90], tail=1, centring=FAR, dtype=dtype)
    rounding = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
    assert case.error(decode, variant=variant, execute=execute) < BOUND + rounding


# ---- Tables

PAIRS = [(64, 1e4), (80, 1e4), (128, 5e5), (256, 1e4)]


def made(head_dim, base, **more):
    centre = Centring(base=base, **more).centre(np.random.default_rng(0), 2, head_dim)
    return centre, -(-head_dim // 32) * 32


def of_fragments(words, rows, columns, dialect):
    """The matrix that lanes hold, read as ``tq_exact_matrix`` reads it."""
    row, quad = lanes(dialect)
    matrix = np.empty((rows, columns))
    words = words.reshape(rows // 16, columns // 16, 2, 32, 4)
    for i, j in np.ndindex(rows // 16, columns // 16):
        for quarter in range(4):
            if dialect == "metal":
                start = 2 * (quarter % 2)
                numbers = words[i, j, quarter // 2, :, start : start + 2].copy().view(np.float32)
            else:
                halves = words[i, j, :, :, quarter : quarter + 1].copy().view(np.float16)
                numbers = halves.astype(np.float64).sum(axis=0)
            for e in range(2):
                at_row, at_column = row + 8 * (quarter % 2), 2 * quad + e + 8 * (quarter // 2)
                matrix[16 * i + at_row, 16 * j + at_column] = numbers[:, e]
    return matrix


def lanes(dialect):
    """Row and quad of each lane: TQ_ROW and TQ_QUAD of the dialects."""
    lane = np.arange(32)
    if dialect == "metal":
        return (lane >> 2 & 4) | (lane >> 1 & 3), (lane >> 2 & 2) | (lane & 1)
    return lane >> 2, lane & 3


@pytest.mark.parametrize("dialect", ["metal", "cuda"])
@pytest.mark.parametrize(("head_dim", "base"), PAIRS)
def test_fragments_give_cosines_and_sines(head_dim, base, dialect):
    centre, dim = made(head_dim, base)
    window = next(w for w in reversed(decode_kernel.WINDOWS) if tables.fits(centre, dim, w))
    words = np.array(tables.fragments(centre, dim, window, dialect))
    pairs = dim // 2
    first, second, steps = words[: 3 * pairs].reshape(3, pairs)[:, : head_dim // 2]
    assert sorted(zip(first, second, steps, strict=True)) == sorted(map(tuple, centre.pairs))
    parts = np.split(words[3 * pairs :], np.cumsum([16 * pairs] * 2 + [8 * window]))
    weights = [of_fragments(x, 16, pairs, dialect) for x in parts[:2]]
    functions = [of_fragments(x, window // 2, 16, dialect) for x in parts[2:]]
    angles = np.outer(np.arange(window // 2) + 0.5, steps * (2 * np.pi / 2**32))
    for f, u, w in zip((np.cos, np.sin), functions, weights, strict=True):
        assert abs((u @ w)[:, : head_dim // 2] - f(angles)).max() < 2e-6


@pytest.mark.parametrize(("head_dim", "base"), PAIRS)
def test_rows_give_cosines_and_sines(head_dim, base):
    centre, dim = made(head_dim, base)
    window, pairs = decode_kernel.FMA_WINDOW, dim // 2
    words, turned = tables.rows(centre, dim, window)
    words, functions = np.array(words), turned + 4
    steps = words[2 * pairs : 3 * pairs]
    numbers = words[3 * pairs :].view(np.float32).astype(np.float64)
    folds = numbers[: 8 * (pairs - turned)].reshape(2, 4, -1)
    values = numbers[8 * (pairs - turned) :].reshape(functions, window // 2, 2)
    angles = np.outer(steps * (2 * np.pi / 2**32), np.arange(window // 2) + 0.5)
    for f, fold, u in zip((np.cos, np.sin), folds, np.moveaxis(values, 2, 0), strict=True):
        assert abs(u[:turned] - f(angles[:turned])).max() < 1e-6
        assert abs(fold.T @ u[turned:] - f(angles[turned:])).max() < 2e-6


def test_fewer_functions_than_a_window_spans_do_not_fit():
    centre, dim = made(256, 1e4)
    assert not tables.fits(centre, dim, 128)
    assert tables.fits(centre, dim, decode_kernel.MIN_WINDOW)


def test_means_and_signs():
    centre, dim = made(80, 1e4, turned=32)
    pairs = tables.sorted_pairs(centre)
    means = float64(tables.means(centre, dim))
    assert np.array_equal(means[:, :40], float64(centre.mu)[:, pairs[:, :2]])
    assert not means[:, 40:].any()
    divided = float64(tables.smoothed_signs(centre, dim))
    assert np.allclose(abs(divided[:, :80]), 1 / float64(centre.smoothing))


def test_the_reference_is_the_centre_s_own():
    centre, _ = made(64, 1e4)
    positions = np.array([0, 1, 131071, 10**6])
    assert np.allclose(
        turned_means(centre, positions), float64(centre.at(mx.array(positions))), atol=1e-5
    )
