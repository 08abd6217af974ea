import centres
import mlx.core as mx
import numpy as np
import pytest
from rows import decoded

from vllm_metal_tq import attention, codec
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.rotation import rotate, unrotate

HEAD_DIMS = (64, 80, 96, 128, 256)


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def chunk(heads, kv_heads, length, head_dim, seed=0):
    q = normal(1, heads, length, head_dim, seed=seed)
    return q, *(normal(1, kv_heads, length, head_dim, seed=seed + i) for i in (1, 2))


def compressed(length, kv_heads, head_dim, bits=4, seed=7):
    if length == 0:
        return (mx.zeros((1, kv_heads, 0, head_dim)),) * 2
    page = PageLayout(TurboQuantConfig(bits, bits), head_dim)
    k, v = (normal(1, kv_heads, length, head_dim, seed=seed + i) for i in (0, 1))
    return decoded(codec.encode(k, v, page), page)


def attend(q, k, v, past, **options):
    """``attention.attend``; what is in the room for recent tokens must not matter."""
    shape = [*past[0].shape[:2], k.shape[2], past[0].shape[3]]
    past = [mx.concatenate([x, mx.full(shape, mx.nan)], axis=2).astype(q.dtype) for x in past]
    return attention.attend(q, k, v, past, **options)


def exact(q, k, v, past, visible, sinks=None):
    """Attention in float64, over keys and values that are not rotated."""
    head_dim = q.shape[-1]
    old = [np.array(unrotate(x, head_dim) if x.size else x, np.float64) for x in past]
    k, v = (
        np.concatenate([a, np.array(b, np.float64)], 2) for a, b in zip(old, (k, v), strict=True)
    )
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
    logits = np.array(q, np.float64) @ k.swapaxes(2, 3) * head_dim**-0.5
    logits = np.where(visible, logits, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(np.array(sinks)[None, :, None, None], (*logits.shape[:3], 1))
        logits = np.concatenate([logits, column], axis=3)
    weights = np.exp(logits - logits.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    return weights[..., : k.shape[2]] @ v


def causal(length, past_length):
    return np.tril(np.ones((length, past_length + length), bool), past_length)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("length", "past_length"), [(1, 1), (1, 50), (5, 17), (9, 0)])
def test_attention_is_the_formula(head_dim, group, length, past_length):
    q, k, v = chunk(2 * group, 2, length, head_dim)
    past = compressed(past_length, 2, head_dim)
    mask = "causal" if length > 1 else None
    out = attend(q, k, v, past, scale=head_dim**-0.5, mask=mask)
    expected = exact(q, k, v, past, causal(length, past_length))
    assert np.abs(np.array(out) - expected).max() < 1e-5


def test_masks_and_sinks_are_obeyed():
    q, k, v = chunk(4, 2, 6, 64)
    past = compressed(20, 2, 64)
    visible = causal(6, 20) & (np.random.default_rng(0).random((6, 26)) < 0.7)
    visible[:, -6:] |= np.eye(6, dtype=bool)
    sinks = mx.array([0.5, -1.0, 2.0, 0.0])
    out = attend(q, k, v, past, scale=64**-0.5, mask=mx.array(visible), sinks=sinks)
    assert np.abs(np.array(out) - exact(q, k, v, past, visible, sinks)).max() < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_output_has_the_queries_dtype(dtype):
    q, k, v = (x.astype(dtype) for x in chunk(4, 2, 3, 64))
    past = compressed(20, 2, 64)
    out = attend(q, k, v, past, scale=64**-0.5, mask="causal")
    expected = exact(*(x.astype(mx.float32) for x in (q, k, v)), past, causal(3, 20))
    assert out.dtype == dtype
    assert np.abs(np.array(out.astype(mx.float32)) - expected).max() < 0.03


def test_without_a_past_it_is_plain_attention_bit_for_bit():
    q, k, v = chunk(4, 2, 9, 64)
    plain = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
    assert mx.array_equal(attend(q, k, v, compressed(0, 2, 64), scale=0.125, mask="causal"), plain)


@pytest.mark.parametrize("raw_window", [1, 2, 4, 40])
@pytest.mark.parametrize("recent", [3, 6])
def test_the_decode_mask_shows_every_older_token_once(raw_window, recent):
    mask = np.array(attention.decode_mask("causal", 3, 8, recent, raw_window))
    for i in range(3):
        pages, raw = mask[i, :8], np.pad(mask[i, 8:], (8 - recent, 0))
        assert (pages ^ raw).tolist() == [j <= 5 + i for j in range(8)]
        assert raw.tolist() == [8 - recent <= j <= 5 + i < j + raw_window for j in range(8)]


def test_the_decode_mask_keeps_the_models_own_mask():
    window = causal(3, 5) & (np.arange(5, 8)[:, None] - np.arange(8) < 4)
    mask = np.array(attention.decode_mask(mx.array(window), 3, 8, 3, raw_window=1))
    assert np.array_equal(mask[:, :8] | np.pad(mask[:, 8:], ((0, 0), (5, 0))), window)
    assert mask.sum() == window.sum()


def test_the_decode_mask_refuses_an_additive_mask():
    with pytest.raises(ValueError, match="takes a bool mask, not"):
        attention.decode_mask(mx.zeros((3, 8)), 3, 8, 3, 1)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_with_a_centre_it_is_the_formula_over_the_keys_and_values_that_are_meant(head_dim):
    centre = centres.random(2, head_dim)
    page = PageLayout(TurboQuantConfig(4, 4), head_dim)
    k, v = centres.typical(centre, 48, first=1000)
    rows = codec.encode(k, v, page, centre, mx.arange(1000, 1048))
    past = decoded(rows, page, centre, mx.arange(1000, 1048))
    q, new_k, new_v = chunk(6, 2, 5, head_dim)
    # Recent tokens may be more than the queries' own.
    out = attend(
        q[:, :, 2:],
        new_k,
        new_v,
        [x[None] for x in past],
        scale=head_dim**-0.5,
        mask="causal",
        centre=centre,
    )
    meant = unrotate(past[0], head_dim) / centre.smoothing[:, None]
    expected = exact(q, new_k, new_v, [rotate(meant)[None], past[1][None]], causal(5, 48))[:, :, 2:]
    assert np.abs(np.array(out) - expected).max() < 1e-5
