import centres
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lloyd_max import distortion, lloyd_max
from rows import decoded

from vllm_metal_tq import codec
from vllm_metal_tq.codebook import key_codebook, value_codebook
from vllm_metal_tq.config import SCALAR_WIDTHS, T2, T3, TRELLIS_WIDTHS, WIDTHS, TurboQuantConfig
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.rotation import rotate
from vllm_metal_tq.trellis import TRELLISES

HEAD_DIMS = (64, 80, 96, 128, 256)
# Mean square error of the best uniform mid-rise quantiser of N(0, 1) (Max 1960, table II;
# 5 to 8 bits by the same minimisation).
UNIFORM_OPTIMUM = {2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001040, 8: 0.0000880}
# Mean square error of trellis codes as tools/train_trellis.py prints it, the largest of its dims.
TRELLIS_ERROR = {T2: 0.0759, T3: 0.0199}
# Of what is D short of the whole, made longer until its product with the whole is right.
KEY_ERROR = {width: d / (1 - d) for width, d in (UNIFORM_OPTIMUM | TRELLIS_ERROR).items()}


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def layout(k_width=4, v_width=4, head_dim=128):
    return PageLayout(TurboQuantConfig(k_width, v_width), head_dim)


def round_trip(keys, values, page):
    return decoded(codec.encode(keys, values, page), page)


def some(width):
    """How many vectors say enough: trellis codes take longer, and differ less."""
    return 1024 if width in TRELLIS_WIDTHS else 4096


def value_error(width):
    """Of trellis codes as above, of others Lloyd-Max's."""
    return TRELLIS_ERROR.get(width) or distortion(lloyd_max(width))


def numbers(codes, width):
    """Numbers of levels that codes stand for."""
    if width in SCALAR_WIDTHS:
        return codes
    columns = np.array(codes).reshape(-1, codes.shape[-1]).T
    return mx.array(TRELLISES[width].numbers(columns).T).reshape(codes.shape)


def relative_error(x, y):
    """Mean square error of y over that of x itself."""
    return (mx.square(x - y).sum() / mx.square(x).sum()).item()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_value_error_is_within_4_percent_of_lloyd_max_or_the_trellis(width, head_dim):
    values = normal(some(width), head_dim, seed=width)
    _, restored = round_trip(values, values, layout(v_width=width, head_dim=head_dim))
    assert relative_error(rotate(values), restored) < 1.04 * value_error(width)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_key_error_is_within_2_percent_of_the_unbiased_optimum(width, head_dim):
    keys = normal(some(width), head_dim, seed=width)
    restored, _ = round_trip(keys, keys, layout(k_width=width, head_dim=head_dim))
    assert relative_error(rotate(keys), restored) < 1.02 * KEY_ERROR[width]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_values_keep_their_norm_on_average(width, head_dim):
    values = normal(some(width), head_dim)
    _, restored = round_trip(values, values, layout(v_width=width, head_dim=head_dim))
    ratio = mx.linalg.norm(restored, axis=-1) / mx.linalg.norm(values, axis=-1)
    assert abs(ratio.mean().item() - 1) < {2: 8e-3, 3: 4e-3, T2: 4e-3}.get(width, 2e-3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_products_with_keys_are_right_on_average(width, head_dim):
    """So that logits do not shrink: codes of least squares would lose 12 % at 2 bits."""
    keys = normal(some(width), head_dim)
    restored, _ = round_trip(keys, keys, layout(k_width=width, head_dim=head_dim))
    ratio = (rotate(keys) * restored).sum() / mx.square(keys).sum()
    assert abs(ratio.item() - 1) < {2: 6e-3, T2: 4e-3}.get(width, 2e-3)


@pytest.mark.parametrize("k_width", WIDTHS)
@pytest.mark.parametrize("v_width", WIDTHS)
def test_rows_hold_what_the_codecs_made(k_width, v_width):
    keys, values = normal(3, 5, 80, seed=1), normal(3, 5, 80, seed=2)
    page = layout(k_width, v_width, 80)
    rows = codec.encode(keys, values, page)
    assert rows.dtype == mx.uint8
    assert rows.shape == (3, 5, page.row_bytes)
    k_codes, k_scale = codec.encode_keys(rotate(keys), k_width)
    v_codes, v_scale = codec.encode_values(rotate(values), v_width)
    k_levels = key_codebook(k_width).levels(numbers(k_codes, k_width))
    v_levels = value_codebook(v_width).levels(numbers(v_codes, v_width))
    decoded_keys, decoded_values = decoded(rows, page)
    assert mx.array_equal(decoded_keys, k_levels * k_scale[..., None])
    assert mx.array_equal(decoded_values, v_levels * v_scale[..., None])


def test_planes_hold_the_low_bits_first_and_even_elements_lowest():
    # One 5-bit key, codes 0..7 repeated: a nibble plane, then a plane of bit 4.
    codes = mx.array([[17, 2, 19, 4, 21, 6, 23, 8]], mx.uint8)
    nibbles, top = codec._pack(codes, 5)
    assert nibbles.tolist() == [[0x21, 0x43, 0x65, 0x87]]
    assert top.tolist() == [[0b01010101]]
    assert mx.array_equal(codec._unpack([nibbles, top], 5), codes)


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from(SCALAR_WIDTHS),
    data=st.lists(st.integers(0, 255), min_size=16, max_size=16),
)
def test_packing_loses_nothing(bits, data):
    codes = mx.array([[x % 2**bits for x in data]], mx.uint8)
    planes = codec._pack(codes, bits)
    assert sum(plane.shape[-1] for plane in planes) == 16 * bits // 8
    assert mx.array_equal(codec._unpack(planes, bits), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_zero_vectors_decode_to_zeros(width):
    zeros = mx.zeros((2, 3, 64))
    keys, values = round_trip(zeros, zeros, layout(width, width, 64))
    assert (keys == 0).all()
    assert (values == 0).all()


@pytest.mark.parametrize("width", [4, T3])
def test_a_zero_vector_does_not_disturb_its_neighbours(width):
    page = layout(width, width)
    x = normal(3, 128)
    x[1] = 0
    together, alone = round_trip(x, x, page), round_trip(x[::2], x[::2], page)
    assert mx.array_equal(together[0][::2], alone[0])
    assert (together[1][1] == 0).all()


@pytest.mark.parametrize("width", [4, *TRELLIS_WIDTHS])
@pytest.mark.parametrize("size", [1e-12, 1e-22, 1e-40])  # squares are denormal, and x itself
def test_vectors_too_short_for_an_fp16_scale_decode_to_zeros(size, width):
    x = mx.array(np.array(normal(4, 128)) * np.float32(size))
    keys, values = round_trip(x, x, layout(width, width))
    assert (keys == 0).all()
    assert (values == 0).all()


@settings(max_examples=30, deadline=None)
@given(exponent=st.floats(-3, 3), width=st.sampled_from(WIDTHS))
def test_the_error_does_not_depend_on_the_vectors_length(exponent, width):
    x = normal(256, 128) * 10**exponent
    keys, values = round_trip(x, x, layout(width, width))
    # 8 bits: fp16's rounding of the scale is a good part of the error.
    assert relative_error(rotate(x), keys) < 1.05 * KEY_ERROR[width]
    assert relative_error(rotate(x), values) < 1.05 * value_error(width)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), "hold NaN"),
        (float("inf"), "hold an infinite element"),
        (float("-inf"), "hold an infinite element"),
        (1e30, "too long for an fp16 scale"),
    ],
)
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("width", [4, *TRELLIS_WIDTHS])
def test_what_cannot_be_encoded_is_refused(width, which, bad, message):
    x = {"keys": normal(2, 4, 64), "values": normal(2, 4, 64)}
    x[which][1, 2, 3] = bad
    with pytest.raises(ValueError, match=f"cannot encode: .*{message}") as error:
        codec.encode(x["keys"], x["values"], layout(width, width, 64))
    assert bad == 1e30 or which in str(error.value)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"keys \(4, 64\) and values \(5, 64\)"):
        codec.encode(normal(4, 64), normal(5, 64), layout(head_dim=64))
    with pytest.raises(ValueError, match="head_dim 128"):
        codec.encode(normal(4, 64), normal(4, 64), layout(head_dim=128))


def test_half_precision_input_is_encoded_as_its_float32_value():
    x = normal(8, 64).astype(mx.float16)
    page = layout(head_dim=64)
    exact = x.astype(mx.float32)
    assert mx.array_equal(codec.encode(x, x, page), codec.encode(exact, exact, page))


@pytest.mark.parametrize("widths", [(3, 5), (T3, T2)])
def test_a_token_is_encoded_alike_alone_and_in_company(widths):
    x = normal(2, 33, 96)
    page = layout(*widths, 96)
    whole = np.array(codec.encode(x, x, page))
    alone = np.array(codec.encode(x[:, 7:8], x[:, 7:8], page))
    assert np.array_equal(whole[:, 7:8], alone)


def test_memory_for_encoding_does_not_grow_with_the_prompt():
    def peak(count):
        x = normal(4, count, 128)
        mx.eval(x)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        codec.encode(x, x, layout())
        return mx.get_peak_memory() - held

    # Beyond a few slices: the rows twice, as slices and joined.
    assert peak(4096) < peak(4 * codec.SLICE) + 2.5 * 4 * 4096 * layout().row_bytes


def test_a_centre_without_positions_is_refused():
    page, centre, x = layout(head_dim=64), centres.random(2, 64), normal(2, 16, 64)
    pages = mx.zeros((2, 1, page.page_bytes), mx.uint8)
    with pytest.raises(ValueError, match="a centre needs the positions of the tokens"):
        codec.encode(x, x, page, centre)
    with pytest.raises(ValueError, match="a centre needs the positions of the tokens"):
        codec.decode(pages, page, centre)


class TestCentre:
    """Rows of two KV heads around a centre, encoded with it."""

    @pytest.fixture
    def centre(self):
        return centres.random(2, 64)

    def encoded(self, keys, values, centre, width=4, first=0):
        page = layout(width, width, 64)
        positions = mx.arange(first, first + keys.shape[1])
        rows = codec.encode(keys, values, page, centre, positions)
        return page, rows, decoded(rows, page, centre, positions)

    def flags(self, rows):
        return np.array(rows[..., -4:].view(mx.uint16) >> 15)

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("first", [0, 1_000_000])
    def test_errors_are_those_of_what_is_left(self, centre, width, first):
        keys, values = centres.typical(centre, 600, first)
        _, rows, (got_keys, got_values) = self.encoded(keys, values, centre, width, first)
        assert self.flags(rows).mean() > 0.99
        t = centre.smoothing[:, None]
        noise = keys - centre.at(mx.arange(first, first + 600))
        error = (mx.square(rotate(keys * t) - got_keys).sum() / mx.square(noise * t).sum()).item()
        assert error < 1.02 * KEY_ERROR[width] + 2e-6  # fp16 scales
        error = mx.square(rotate(values) - got_values).sum()
        error = (error / mx.square(values - centre.value_mean[:, None]).sum()).item()
        assert error < 1.03 * value_error(width) + 2e-6

    def test_vectors_off_the_mean_are_stored_whole(self, centre):
        keys, values = centres.typical(centre, 100)
        keys[:, ::2], values[:, 1::2] = normal(2, 50, 64), normal(2, 50, 64, seed=1)
        page, rows, (got_keys, got_values) = self.encoded(keys, values, centre)
        f, g = np.moveaxis(self.flags(rows), -1, 0)
        assert not f[:, ::2].any()
        assert f[:, 1::2].all()
        assert g[:, ::2].all()
        assert not g[:, 1::2].any()
        plain = decoded(codec.encode(keys * centre.smoothing[:, None], values, page), page)
        assert mx.array_equal(got_keys[:, ::2], plain[0][:, ::2])
        assert mx.array_equal(got_values[:, 1::2], plain[1][:, 1::2])

    def test_a_scale_of_minus_zero_keeps_its_flag(self, centre):
        # Keys and values that are the means: nothing is left to encode.
        positions = mx.arange(5, 9)
        keys = centre.at(positions)
        values = mx.broadcast_to(centre.value_mean[:, None], keys.shape)
        _, rows, (got_keys, got_values) = self.encoded(keys, values, centre, first=5)
        assert (self.flags(rows) == 1).all()
        assert (rows[..., -4:].view(mx.float16) == 0).all()
        assert mx.abs(got_keys - rotate(keys * centre.smoothing[:, None])).max().item() < 1e-5
        assert mx.abs(got_values - rotate(values)).max().item() < 1e-5

    def test_zeros_decode_to_zeros(self, centre):
        zeros = mx.zeros((2, 3, 64))
        _, rows, got = self.encoded(zeros, zeros, centre)
        assert (self.flags(rows) == 0).all()
        assert all((x == 0).all() for x in got)

    def test_without_mu_no_key_has_a_flag(self, centre):
        keys, values = centres.typical(centre, 20)
        _, rows, _ = self.encoded(keys, values, centre.without_mu)
        assert (self.flags(rows)[..., 0] == 0).all()
        assert (self.flags(rows)[..., 1] == 1).all()

    def test_without_a_centre_no_scale_is_negative(self):
        keys, values = normal(2, 300, 64), normal(2, 300, 64, seed=1)
        assert (self.flags(codec.encode(keys, values, layout(2, 2, 64))) == 0).all()

    def test_a_token_is_encoded_alike_in_every_chunk(self, centre):
        keys, values = centres.typical(centre, 300)
        page, rows, _ = self.encoded(keys, values, centre)
        alone = codec.encode(keys[:, 290:], values[:, 290:], page, centre, mx.arange(290, 300))
        # Sines of the same phases; a sum may be rounded elsewhere.
        differ = np.array(rows[:, 290:]) != np.array(alone)
        assert differ.mean() < 0.01
