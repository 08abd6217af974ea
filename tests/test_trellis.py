"""Trellis codes: the code against its definition, the encoder against trying all."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import decoded

from vllm_metal_tq import codec, trellis
from vllm_metal_tq.codebook import TRELLIS_LEVELS
from vllm_metal_tq.config import (
    SCALAR_WIDTHS,
    T2,
    T3,
    TRELLIS_WIDTHS,
    WIDTHS,
    TurboQuantConfig,
    bits_of,
)
from vllm_metal_tq.layout import PLANE_BITS, PageLayout
from vllm_metal_tq.rotation import rotate
from vllm_metal_tq.trellis import MASKS, MEMORY, TRELLISES

RING = 8  # elements of a vector of which all codes can be tried


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def plain_numbers(codes, width):
    """The definition: of codes ``(dim,)``, element by element and mask by mask."""
    numbers = []
    for t, code in enumerate(codes):
        number = int(code) >> 1 << 3
        for j, mask in enumerate(MASKS[width]):
            # codes[t - i] of a negative index is that of the ring's end
            taken = [int(codes[t - i]) & 1 for i in range(MEMORY + 1) if mask >> i & 1]
            number |= sum(taken) % 2 << j
        numbers.append(number)
    return np.array(numbers)


def levels(numbers, width):
    return np.array(TRELLIS_LEVELS[width].levels(mx.array(np.asarray(numbers, np.uint8))))


def state(codes):
    """The last six c's, the last in bit 0."""
    return sum((int(code) & 1) << i for i, code in enumerate(codes[: -MEMORY - 1 : -1]))


def square_error(x, codes, width):
    return np.square(x - levels(plain_numbers(codes, width), width)).sum()


def nearest_of_all(x, width, seam):
    """The least square error of any code that has this state at its seam."""
    found = np.inf
    table = np.square(x[:, None] - levels(np.arange(8 << bits_of(width) - 1), width))
    for bits in itertools.product((0, 1), repeat=RING):
        if state(bits) == seam:
            sets = plain_numbers(bits, width)
            costs = [table[t, number::8].min() for t, number in enumerate(sets)]
            found = min(found, sum(costs))
    return found


codes_of = st.sampled_from(TRELLIS_WIDTHS).flatmap(
    lambda width: st.tuples(
        st.just(width),
        st.integers(1, 6).flatmap(
            lambda n: st.lists(
                st.integers(0, 2 ** bits_of(width) - 1), min_size=8 * n, max_size=8 * n
            )
        ),
    )
)


@settings(max_examples=50, deadline=None)
@given(codes_of)
def test_unfolded_planes_are_the_numbers_of_the_definition(drawn):
    width, codes = drawn
    wanted = plain_numbers(codes, width)
    planes = codec._pack(mx.array([codes], mx.uint8), width)
    assert codec._unpack(planes, width)[0].tolist() == wanted.tolist()
    of_numpy, widths = codec.unfolded([np.array(plane) for plane in planes], width)
    of_mlx, _ = codec.unfolded(planes, width)
    assert widths == (1,) * len(of_numpy)
    for one, other in zip(of_numpy, of_mlx, strict=True):
        assert isinstance(one, np.ndarray)
        assert np.array_equal(one, np.array(other))


@settings(max_examples=50, deadline=None)
@given(codes_of)
def test_the_encoders_numbers_are_those_of_the_definition(drawn):
    width, codes = drawn
    found = TRELLISES[width].numbers(np.array(codes, np.uint8)[:, None])[:, 0]
    assert found.tolist() == plain_numbers(codes, width).tolist()


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_every_level_is_of_some_code(width):
    """So that the parities are independent: no set is out of reach."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits_of(width), (512, 1), dtype=np.uint8)
    numbers = TRELLISES[width].numbers(codes)
    assert np.array_equal(np.unique(numbers), np.arange(1 << TRELLIS_LEVELS[width].bits))


def test_taps_of_kernels_are_the_masks_seven_bits_each():
    for width in TRELLIS_WIDTHS:
        *_, taps = trellis.kernel_planes(width)
        assert tuple(taps >> 7 * j & 127 for j in range(3)) == MASKS[width]
        assert taps < 1 << 21


@pytest.mark.parametrize("width", WIDTHS)
def test_planes_of_kernels_are_those_of_pages(width):
    low, high, taps = trellis.kernel_planes(width)
    assert low == PLANE_BITS[width][0]
    assert low + high == bits_of(width)
    assert (taps == 0) == (width in SCALAR_WIDTHS)


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_no_code_with_the_encoders_seam_is_nearer(width):
    x = np.array(normal(RING, 6, seed=width))
    codes = TRELLISES[width].codes(x)
    for column, chosen in zip(x.T, codes.T, strict=True):
        best = nearest_of_all(column, width, state(chosen))
        assert square_error(column, chosen, width) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
@pytest.mark.parametrize(("dim", "loss"), [(64, 0.03), (128, 0.02), (256, 0.01)])
def test_the_guess_of_the_seam_costs_little(dim, loss, width):
    """Against the best of all seams, each tried."""
    x, encoder = np.array(normal(dim, 64, seed=width)), TRELLISES[width]

    def error(codes):
        return np.square(x - levels(encoder.numbers(codes), width)).sum(axis=0)

    seams = (np.full(x.shape[1], seam) for seam in range(1 << MEMORY))
    best = np.min([error(encoder.around(x, seam)) for seam in seams], axis=0)
    found = error(encoder.codes(x))
    assert (found > best * (1 - 1e-5)).all()
    assert found.mean() < (1 + loss) * best.mean()


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_levels_that_a_code_can_have_are_their_own_code(width):
    rng = np.random.default_rng(width)
    codes = rng.integers(0, 1 << bits_of(width), (128, 16), dtype=np.uint8)
    x = levels(TRELLISES[width].numbers(codes), width)
    assert np.array_equal(TRELLISES[width].codes(x), codes)


@pytest.mark.parametrize(("width", "bar"), [(T2, 0.079), (T3, 0.0208)])
@pytest.mark.parametrize("which", [0, 1])
def test_error_of_a_normal_distribution(which, width, bar):
    """Of rows as they are stored, at D=128, by three standard errors.

    Keys are made longer than least squares would: that is taken off again.
    """
    x = normal(512, 128)
    page = PageLayout(TurboQuantConfig(width, width), 128)
    restored = decoded(codec.encode(x, x, page), page)[which]
    if which == 0:
        restored = restored / codec.KEY_GAINS[width]
    errors = np.array(mx.square(rotate(x) - restored).mean(axis=-1) / mx.square(x).mean())
    assert errors.mean() + 3 * errors.std() / np.sqrt(len(errors)) <= bar


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_many_vectors_are_coded_as_each_alone(width):
    """Beyond a slice too."""
    y = normal(trellis.SLICE + 3, 32)
    codes, scales = TRELLISES[width].nearest(y, 1.0)
    for i in (0, trellis.SLICE - 1, trellis.SLICE, trellis.SLICE + 2):
        alone, scale = TRELLISES[width].nearest(y[i], 1.0)
        assert mx.array_equal(codes[i], alone)
        assert scales[i] == scale


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-20, 20), width=st.sampled_from(TRELLIS_WIDTHS))
def test_codes_do_not_depend_on_the_vectors_length(exponent, width):
    y = normal(3, 64)
    codes, _ = TRELLISES[width].nearest(y * 2.0**exponent, 1.0)
    assert mx.array_equal(codes, TRELLISES[width].nearest(y, 1.0)[0])


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 1e-40])
def test_a_vector_without_a_step_does_not_disturb_its_neighbours(bad, width):
    y = normal(3, 64)
    wanted = TRELLISES[width].nearest(y[::2], 1.0)
    y[1] = bad
    codes, scales = TRELLISES[width].nearest(y, 1.0)
    assert mx.array_equal(codes[::2], wanted[0])
    assert mx.array_equal(scales[::2], wanted[1])
    assert scales[1] == 0 if bad == 1e-40 else not mx.isfinite(scales[1])
