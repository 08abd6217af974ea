"""Encode with a centre and with a ring of recent tokens: codec.encode and Tail up to rounding."""

import centres
import mlx.core as mx
import numpy as np
import pytest
from rows import decoded

from vllm_metal_tq import codec
from vllm_metal_tq.centre import Centre
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.kernels import encode as kernel
from vllm_metal_tq.kernels.encode import encode, store
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.rotation import rotate
from vllm_metal_tq.tail import TAIL, pushed, sources

EXCESS = 1e-3  # as in test_encode.py
SAME_ROWS = 0.93
POSITIONS = [0, 131071, 1_000_000]
# Of the mean's length: what float32 leaves of a phase, its cosine and the products with them.
TURN_ERROR = 4e-7


def layout(k_width=4, v_width=4, head_dim=64):
    return PageLayout(TurboQuantConfig(k_width, v_width), head_dim)


def start(position=0, index=0):
    return mx.array([position, index], mx.int32)


def paired(centre: Centre, how: str) -> Centre:
    """The centre with other pairs of elements, of which some may not turn."""
    head_dim = centre.mu.shape[1]
    elements = np.arange(head_dim, dtype=np.uint32)
    rotary = head_dim // 2 if how == "partial" else head_dim
    if how == "adjacent":
        pairs = elements.reshape(-1, 2)
    else:
        turning, still = elements[:rotary], elements[rotary:]
        pairs = np.concatenate([turning.reshape(2, -1).T, still.reshape(-1, 2)])
    steps = np.zeros(len(pairs), np.uint32)
    steps[: rotary // 2] = centre.pairs[: rotary // 2, 2]
    smoothing = np.array(centre.smoothing)
    smoothing[:, pairs[:, 1]] = smoothing[:, pairs[:, 0]]  # equal within a pair
    pairs = np.concatenate([pairs, steps[:, None]], axis=1).astype(np.uint32)
    return Centre(pairs, centre.mu, mx.array(smoothing), centre.value_mean)


def means_in_float64(centre: Centre, positions) -> np.ndarray:
    """R_j mu ``(num_kv_heads, n, head_dim)``, straight from its definition."""
    mu = np.array(centre.mu, np.float64)[:, None]
    means = np.zeros((len(mu), len(positions), mu.shape[-1]))
    for first, second, step in centre.pairs.tolist():
        phi = 2 * np.pi * np.array([j * step % 2**32 for j in positions]) / 2**32
        means[..., first] = mu[..., first] * np.cos(phi) - mu[..., second] * np.sin(phi)
        means[..., second] = mu[..., second] * np.cos(phi) + mu[..., first] * np.sin(phi)
    return means


def flags(rows, page):
    scales = np.array(rows)[..., page.code_bytes :].copy().view(np.uint16)
    return scales[..., 0] >> 15 == 1, scales[..., 1] >> 15 == 1


def stored(rows, page):
    """Keys and values as they are stored, float32 and still rotated."""
    found = np.array(rows)
    found[..., page.code_bytes + 1 :: 2] &= 0x7F  # without the flags
    return decoded(mx.array(found), page)


@pytest.mark.parametrize(
    ("k_width", "v_width", "head_dim", "dtype", "how"),
    [
        (4, 4, 64, mx.bfloat16, "half"),
        (4, 4, 64, mx.float32, "adjacent"),
        (3, 3, 128, mx.float16, "half"),
        (4, 4, 128, mx.bfloat16, "partial"),
        (8, 6, 128, mx.bfloat16, "adjacent"),
        (4, 4, 80, mx.float32, "half"),
        (5, 2, 96, mx.float16, "half"),
        (2, 5, 96, mx.bfloat16, "adjacent"),
        (4, 4, 256, mx.bfloat16, "half"),
        (6, 4, 256, mx.float32, "partial"),
    ],
)
def test_encode_with_a_centre_is_the_codecs_up_to_rounding(
    k_width, v_width, head_dim, dtype, how, execute
):
    page, position = layout(k_width, v_width, head_dim), 1000
    centre = paired(centres.random(2, head_dim, size=1.0), how)
    keys, values = (x.astype(dtype) for x in centres.typical(centre, 61, first=position))
    rows = encode(keys, values, page, execute, start=start(position), centre=centre)
    oracle = codec.encode(keys, values, page, centre, mx.arange(position, position + 61))
    same = (rows == oracle).all(axis=-1).astype(mx.float32).mean().item()
    assert same >= SAME_ROWS
    for found, wanted in zip(flags(rows, page), flags(oracle, page), strict=True):
        assert (found == wanted).mean() > 0.99
        assert found.any()
    centred = keys * centre.smoothing[:, None], values
    means = centre.at(mx.arange(position, position + 61)) * centre.smoothing[:, None]
    means = means, mx.broadcast_to(centre.value_mean[:, None], values.shape)
    for i in range(2):
        errors = []
        for x in (rows, oracle):
            flag = mx.array(flags(x, page)[i])[..., None]
            rest = centred[i].astype(mx.float32) - mx.where(flag, means[i], 0)
            errors.append(mx.square(stored(x, page)[i] - rotate(rest)).sum().item())
        assert errors[0] <= (1 + EXCESS) * errors[1]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("how", ["half", "adjacent", "partial"])
def test_means_are_turned_right_far_from_the_start(position, how, execute):
    """A key that is R_j mu to float32 leaves next to nothing."""
    head_dim, count = 128, 40
    page = layout(8, 4, head_dim)
    centre = paired(centres.random(2, head_dim, size=1000.0), how)
    means = means_in_float64(centre, range(position, position + count))
    keys = mx.array(means.astype(np.float32))
    rows = encode(keys, keys, page, execute, start=start(position), centre=centre)
    assert flags(rows, page)[0].all()
    rest, _ = stored(rows, page)
    length = mx.linalg.norm(rotate(centre.mu * centre.smoothing), axis=-1)[:, None]
    assert (mx.linalg.norm(rest, axis=-1) / length).max().item() < TURN_ERROR


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_errors_are_those_of_what_is_left(size, head_dim, execute):
    """However long the mean is: keys and values are as near as they would be around zero."""
    page, position = layout(4, 4, head_dim), 70_000
    centre = centres.random(2, head_dim, size=size)
    noise = [mx.random.normal((2, 50, head_dim), key=mx.random.key(i)) for i in range(2)]
    positions = range(position, position + 50)
    keys = mx.array(means_in_float64(centre, positions).astype(np.float32)) + noise[0]
    values = centre.value_mean[:, None] + noise[1]
    rows = encode(keys, values, page, execute, start=start(position), centre=centre)
    around_zero = Centre(centre.pairs, 0 * centre.mu, centre.smoothing, 0 * centre.value_mean)
    plain = encode(*noise, page, execute, start=start(position), centre=around_zero)
    assert not np.any(flags(plain, page))
    wanted = rotate(noise[0] * centre.smoothing[:, None]), rotate(noise[1])
    means = means_in_float64(centre, positions) * np.array(centre.smoothing)[:, None]
    means = means, np.broadcast_to(np.array(centre.value_mean)[:, None], means.shape)
    for i in range(2):
        flag = flags(rows, page)[i][..., None]
        kept = rotate(mx.array(np.where(flag, 0, means[i]).astype(np.float32)))
        found = mx.square(stored(rows, page)[i] - kept - wanted[i]).sum().item()
        zero = mx.square(stored(plain, page)[i] - wanted[i]).sum().item()
        assert found < 1.25 * zero
        if size > 1:
            assert flag.all()
            assert found < 1.05 * zero


def test_flags_say_where_the_mean_makes_a_vector_longer(execute):
    page, centre = layout(), centres.random(2, 64)
    keys, values = centres.typical(centre, 30)
    keys[:, :7], values[:, 5:11] = -keys[:, :7], -values[:, 5:11]
    rows = encode(keys, values, page, execute, start=start(), centre=centre)
    f, g = flags(rows, page)
    assert np.array_equal(f, np.broadcast_to(np.arange(30) >= 7, f.shape))
    assert np.array_equal(~g, np.broadcast_to((np.arange(30) >= 5) & (np.arange(30) < 11), g.shape))


@pytest.mark.parametrize("uncentred", [0, 1, 16, 60])
def test_the_first_tokens_keep_the_mean_of_keys(uncentred, execute):
    page, centre = layout(), centres.random(2, 64)
    keys, values = centres.typical(centre, 40)
    rows = encode(keys, values, page, execute, uncentred=uncentred, centre=centre)
    f, g = flags(rows, page)
    assert np.array_equal(f, np.broadcast_to(np.arange(40) >= uncentred, f.shape))
    assert g.all()
    first = encode(keys, values, page, execute, start=start(), centre=centre.without_mu)
    whole = encode(keys, values, page, execute, start=start(), centre=centre)
    assert mx.array_equal(rows[:, :uncentred], first[:, :uncentred])
    assert mx.array_equal(rows[:, uncentred:], whole[:, uncentred:])


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_row_with_a_centre_does_not_depend_on_its_neighbours(head_dim, execute):
    page, centre = layout(3, 4, head_dim), centres.random(2, head_dim)
    keys, values = centres.typical(centre, 33, first=50)
    rows = encode(keys, values, page, execute, start=start(50), centre=centre)
    some = slice(9, 14)
    alone = encode(keys[:, some], values[:, some], page, execute, start=start(59), centre=centre)
    assert mx.array_equal(alone, rows[:, some])
    many = encode(keys, values, page, execute, start=start(50), centre=centre, many=True)
    assert mx.array_equal(many, rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_encoded_gets_a_scale_that_is_nan(bad, execute):
    page, centre = layout(), centres.random(2, 64)
    keys, values = centres.typical(centre, 5)
    keys[1, 2, 7], values[0, 3, 9] = bad, bad
    rows = np.array(encode(keys, values, page, execute, start=start(), centre=centre))
    wrong = np.zeros((2, 5, 2), bool)
    wrong[1, 2, 0] = wrong[0, 3, 1] = True
    assert np.array_equal(np.isnan(rows[..., page.code_bytes :].copy().view(np.float16)), wrong)


@pytest.mark.parametrize("how", ["half", "adjacent", "partial"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_lanes_know_which_of_their_elements_turn_alike(head_dim, how):
    centre = paired(centres.random(2, head_dim), how)
    apart = {
        (dim, share): kernel.alike(centre, dim, share) for dim in (head_dim,) for share in (16, 32)
    }
    if head_dim == 96:
        assert kernel.alike(centre, 96, 12) == {"half": 6, "adjacent": 0, "partial": 3}[how]
    else:
        wanted = {"half": (8, 16), "adjacent": (1, 1), "partial": (0, 8)}[how]
        if (head_dim, how) == (64, "partial"):
            wanted = (0, 8)
        assert tuple(apart.values()) == wanted


class TestTail:
    @pytest.mark.parametrize(
        ("head_dim", "dtype"),
        [
            (64, mx.float32),
            (80, mx.bfloat16),
            (72, mx.float16),
            (20, mx.float16),
            (128, mx.float16),
        ],
    )
    def test_any_element(self, head_dim, dtype, execute):
        self.check(40, 7, execute, head_dim, dtype)

    def check(self, index, count, execute, head_dim=64, dtype=mx.bfloat16):
        def random(tokens, seed):
            return mx.random.normal((3, tokens, head_dim), key=mx.random.key(seed)).astype(dtype)

        keys, values, *old = random(count, 0), random(count, 1), random(TAIL, 2), random(TAIL, 3)
        page, where = layout(4, 4, head_dim), start(7, index)
        fresh, old = (keys[None], values[None]), [x[None] for x in old]
        rows, *new = store(*fresh, tuple(old), page, starts=where[None], execute=execute)
        source = sources((index,), count)
        for found, *parts in zip(new, old, fresh, strict=True):
            assert found.dtype == dtype
            assert mx.array_equal(found, pushed(*parts, source))
        assert mx.array_equal(rows[0], encode(keys, values, page, execute))

    def test_with_a_centre(self, execute):
        page, centre = layout(), centres.random(2, 64)
        keys, values = centres.typical(centre, 9, first=20)
        old = tuple(mx.random.normal((1, 2, TAIL, 64), key=mx.random.key(i)) for i in range(2))
        fresh, where = (keys[None], values[None]), start(20, 20)
        options = {"centre": centre, "execute": execute}
        rows, *new = store(*fresh, old, page, starts=where[None], **options)
        source = sources((20,), 9)
        assert mx.array_equal(rows[0], encode(keys, values, page, start=where, **options))
        for found, *parts in zip(new, old, fresh, strict=True):
            assert mx.array_equal(found, pushed(*parts, source))
