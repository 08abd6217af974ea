"""The schemes to compare with: what each loses on random data, stores, and attends to."""

import baselines
import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
import pytest
from baselines import FakeQuantCache, Scheme, Side
from lloyd_max import distortion, lloyd_max
from models import llama, tokens

# Scheme, bits of keys and values for head dims 64 and 128, windows left out, and the square error
# of N(0, 1) keys and values with 64-dimensional heads, relative to their energy.
PINNED = [
    (baselines.vllm_metal(8, 3), (9, 3.5), (9, 3.5), (2.27e-5, 0.0328)),
    (baselines.vllm_metal(4, 4), (5, 4.5), (5, 4.5), (0.00657, 0.00897)),
    (baselines.mlx_lm(8, 8), (8.5, 8.5), (8.5, 8.5), (2.97e-5, 2.97e-5)),
    (baselines.mlx_lm(4, 4), (4.5, 4.5), (4.5, 4.5), (0.00833, 0.00833)),
    (baselines.mlx_lm(8, 4), (8.5, 4.5), (8.5, 4.5), (2.97e-5, 0.00833)),
    (baselines.hadamard(4, 4), (4.25, 4.25), (4.125, 4.125), (0.01037, 0.01037)),
    (baselines.hadamard(2, 2), (2.25, 2.25), (2.125, 2.125), (0.1168, 0.1168)),
    (baselines.kivi(2, 2), (3, 3), (3, 3), (0.1653, 0.1660)),
    (baselines.kivi(4, 4), (5, 5), (5, 5), (0.00653, 0.00657)),
    (
        baselines.outlier_channels(4, 4),
        ((10 * 16 + 54 * 4 + 16) / 64, 4.25),
        ((19 * 16 + 109 * 4 + 16) / 128, 4.125),
        (0.00832, 0.01037),
    ),
    (baselines.turboquant_qjl(4, 4), (4.5, 4.25), (4.25, 4.125), (0.0513, 0.00922)),
]
NAMES = [scheme.name for scheme, *_ in PINNED]


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def error(x, quantise):
    return (mx.square(quantise(x) - x).sum() / mx.square(x).sum()).item()


@pytest.mark.parametrize(("scheme", "_bits64", "_bits128", "errors"), PINNED, ids=NAMES)
def test_errors_on_random_data(scheme, _bits64, _bits128, errors):
    x = normal(1, 2, 512, 64)
    for side, pinned in zip((scheme.keys, scheme.values), errors, strict=True):
        assert error(x, side.quantise) == pytest.approx(pinned, rel=0.02)


@pytest.mark.parametrize(("scheme", "bits64", "bits128", "_errors"), PINNED, ids=NAMES)
def test_bits_count_every_scale(scheme, bits64, bits128, _errors):
    for head_dim, bits in ((64, bits64), (128, bits128)):
        assert (scheme.keys.bits(head_dim), scheme.values.bits(head_dim)) == pytest.approx(bits)


@pytest.mark.parametrize("scheme", baselines.SCHEMES, ids=lambda scheme: scheme.name)
def test_quantising_twice_or_scaled_or_zeros(scheme):
    x = normal(1, 2, 32, 64)
    for side in (scheme.keys, scheme.values):
        y = side.quantise(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert error(8 * x, side.quantise) == pytest.approx(error(x, side.quantise), rel=0.02)
        assert mx.abs(side.quantise(mx.zeros_like(x))).max().item() < 1e-5


def test_bits_of_mlx_lm_are_the_bytes_of_its_cache():
    for bits in (4, 8):
        cache = host.QuantizedKVCache(group_size=64, bits=bits)
        x = normal(1, 2, 256, 128).astype(mx.bfloat16)
        cache.update_and_fetch(x, x)
        stored = sum(part.nbytes for side in (cache.keys, cache.values) for part in side)
        assert 8 * stored / (2 * x.size) == baselines.mlx_lm(bits, bits).bits(128, 256)


def test_windows_count_as_bf16():
    # 64 of 1024 keys on average and 128 of 1024 values; 32 of both.
    kivi = baselines.kivi(2, 2)
    assert kivi.bits(64, 1024) == pytest.approx((3 + 13 * 64 / 1024 + 3 + 13 * 128 / 1024) / 2)
    tail = baselines.with_tail(baselines.hadamard(4, 4))
    assert tail.bits(128, 1024) == pytest.approx(4.125 + (16 - 4.125) * 32 / 1024)
    assert tail.bits(128, 16) == 16


def test_levels_are_those_of_lloyd_and_max():
    for bits in (1, 2, 3, 4, 6):
        levels = baselines.normal_levels(bits).astype(np.float64)
        assert distortion(levels) == pytest.approx(distortion(lloyd_max(bits)), rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_steps_are_the_best_uniform_ones(bits):
    x = np.random.default_rng(1).standard_normal(400_000)
    half = (2**bits - 1) / 2

    def distortion(step):
        return np.mean((np.clip(np.floor(x / step) + 0.5, -half, half) * step - x) ** 2)

    best = baselines.BEST_STEPS[bits]
    assert distortion(best) <= 1.003 * min(distortion(best * f) for f in (0.94, 0.97, 1.03, 1.06))


def test_outliers_keep_the_loudest_channels():
    x = normal(1, 2, 64, 64)
    loud = mx.array([3, 17, 40, 63])
    x[..., loud] *= 100
    y = baselines.outliers(x, 2, 4 / 64)
    assert mx.array_equal(y[..., loud], x[..., loud].astype(mx.bfloat16).astype(mx.float32))
    assert 0.1 < error(x[..., 4:17], lambda _: y[..., 4:17]) < 0.13


def test_per_channel_quantises_a_constant_channel_exactly():
    x = normal(1, 1, 64, 64)
    x[..., 5] = 30.0
    y = baselines.per_channel(x, 2)
    assert mx.abs(y[..., 5] - 30.0).max().item() < 0.02
    assert error(x, lambda x: baselines.per_channel(x, 2)) < error(
        x, lambda x: baselines.affine(x, 2, 32)
    )


def test_qjl_has_unbiased_inner_products_and_a_larger_error():
    x, q = normal(1, 1, 4000, 64), normal(1, 1, 1, 64, seed=1)
    x = x - (x * q).sum(-1, keepdims=True) * q / (q * q).sum() + 0.2 * q  # all with q.x = 0.2 |q|^2
    true = (0.2 * (q * q).sum()).item()

    def inner(quantise):
        return ((quantise(x) * q).sum(axis=-1).mean() / true).item()

    def plain(x):
        return baselines.lloyd_max(x, 2, 64)

    def sketched(x):
        return baselines.qjl(x, 2)

    assert abs(inner(baselines.rotated(sketched)) - 1) < 0.12  # on average over sketches: 0
    assert inner(baselines.rotated(lambda x: baselines.lloyd_max(x, 1, 64))) < 0.75
    assert error(x, sketched) > error(x, plain)


def halves(factor):
    """A quantiser for tests, whose output tells which tokens were read quantised."""
    return lambda x: x * factor


def expected(queries, keys, values, scheme, kept):
    """Token-by-token decoding in numpy: at position i the tokens ``kept(i)`` are as they came."""
    out = np.zeros_like(queries)
    groups = queries.shape[1] // keys.shape[1]
    for i in range(queries.shape[2]):
        for head in range(queries.shape[1]):
            k, v = keys[0, head // groups, : i + 1], values[0, head // groups, : i + 1]
            raw_k, raw_v = (np.isin(np.arange(i + 1), list(tokens))[:, None] for tokens in kept(i))
            logits = np.where(raw_k, k, 0.5 * k) @ queries[0, head, i] * 0.125
            weights = np.exp(logits - logits.max())
            out[0, head, i] = weights / weights.sum() @ np.where(raw_v, v, 0.25 * v)
    return out


@pytest.mark.parametrize(
    ("window", "kept"),
    [
        ((0, False), lambda i: ({i}, {i})),
        ((5, False), lambda i: (set(range(i - 5, i + 1)), {i})),
        ((8, True), lambda i: (set(range(i // 8 * 8, i + 1)), {i})),
    ],
    ids=["none", "sliding", "flushed"],
)
def test_a_chunk_attends_as_token_by_token_decoding(window, kept):
    scheme = Scheme(
        "test", "", Side(halves(0.5), lambda _: 1, *window), Side(halves(0.25), lambda _: 1)
    )
    queries, keys, values = normal(1, 4, 70, 16), normal(1, 2, 70, 16, seed=1), normal(1, 2, 70, 16)
    cache = FakeQuantCache(scheme)
    outputs = []
    for start, end in ((0, 32), (32, 64), (64, 70)):
        piece = [x[:, :, start:end] for x in (queries, keys, values)]
        fetched = cache.update_and_fetch(*piece[1:])
        outputs.append(cache.attend(piece[0], *fetched, 0.125, "causal", None))
    wanted = expected(*(np.array(x, np.float64) for x in (queries, keys, values)), scheme, kept)
    assert np.array(mx.concatenate(outputs, axis=2)) == pytest.approx(wanted, abs=1e-5)


def test_a_model_attends_through_the_cache():
    model, ids = llama(), tokens(64)
    exact = Side(halves(1), lambda _: 32)
    plain = model(ids, cache=host.make_prompt_cache(model))
    through = model(ids, cache=Scheme("exact", "", exact, exact).caches(model))
    assert mx.abs(plain - through).max().item() < 1e-4
    coarse = model(ids, cache=baselines.hadamard(2, 2).caches(model))
    assert mx.abs(plain - coarse).max().item() > 1e-3


def test_other_masks_are_refused():
    cache = FakeQuantCache(baselines.hadamard(4, 4))
    x = normal(1, 2, 4, 32)
    fetched = cache.update_and_fetch(x, x)
    with pytest.raises(ValueError, match="causally"):
        cache.attend(x, *fetched, 1.0, mx.ones((4, 4), mx.bool_), None)
