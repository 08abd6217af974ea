import itertools

import numpy as np
import pytest

from vllm_metal_tq.config import BLOCK_SIZES, PRESETS, WIDTHS, TurboQuantConfig, bits_of
from vllm_metal_tq.layout import PLANE_BITS, SUB_BLOCK, PageLayout

HEAD_DIMS = (64, 80, 96, 128, 256)


def layout(k_width=4, v_width=4, head_dim=128, block_size=16):
    return PageLayout(TurboQuantConfig(k_width, v_width, block_size), head_dim)


@pytest.mark.parametrize(
    ("preset", "row_bytes"),
    [
        ("tq8", (116, 228, 452)),
        ("tq6", (92, 180, 356)),
        ("tq4", (68, 132, 260)),
        ("tq3", (52, 100, 196)),
        ("tq2", (36, 68, 132)),
    ],
)
def test_bytes_per_token_and_kv_head(preset, row_bytes):
    config = TurboQuantConfig(*PRESETS[preset])
    assert tuple(PageLayout(config, dim).row_bytes for dim in (64, 128, 256)) == row_bytes


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_is_its_codes_and_two_fp16_scales(width, head_dim):
    dim, bits = {80: 96}.get(head_dim, head_dim), bits_of(width)
    assert layout(width, 2, head_dim).row_bytes == (bits + 2) * dim // 8 + 4
    assert layout(2, width, head_dim).row_bytes == (bits + 2) * dim // 8 + 4


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_page_has_no_padding(block_size):
    assert layout(block_size=block_size).page_bytes == block_size * layout().row_bytes


def test_llama_3_2_1b_holds_99280_tokens_where_bf16_held_38768():
    layers, kv_heads, head_dim = 16, 8, 64
    memory = 38_768 * layers * kv_heads * head_dim * 2 * 2
    per_block = layout(8, 3, head_dim).page_bytes * layers * kv_heads
    assert memory // per_block * 16 >= 99_280


def test_planes_add_up_to_the_width():
    assert all(sum(planes) == bits_of(width) for width, planes in PLANE_BITS.items())
    assert tuple(PLANE_BITS) == WIDTHS


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_byte_belongs_to_one_byte_of_one_token(width, head_dim, block_size):
    page = layout(width, width, head_dim, block_size)
    assert page.byte_offsets.shape == (block_size, page.row_bytes)
    assert np.array_equal(np.sort(page.byte_offsets, axis=None), np.arange(page.page_bytes))


def test_a_sub_block_holds_a_plane_of_16_tokens_after_the_other():
    page = layout(3, 4, 64, block_size=32)
    starts = np.cumsum((0, *page.plane_bytes))
    for start, end in itertools.pairwise(starts):
        first = page.byte_offsets[:SUB_BLOCK, start:end]
        assert np.array_equal(
            np.sort(first, axis=None), np.arange(SUB_BLOCK * start, SUB_BLOCK * end)
        )
        second = page.byte_offsets[SUB_BLOCK:, start:end]
        assert np.array_equal(second, first + SUB_BLOCK * page.code_bytes)


def test_a_lane_finds_two_halves_of_its_key_dimensions_in_the_halves_of_a_word():
    # 4 bits, D=128: a lane's 32 dimensions are 16 bytes; 0-3 lie beside 16-19, 4-7 beside 20-23.
    offsets = layout(4, 4, 128).byte_offsets[0, :16]
    assert offsets.tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]


def test_a_lane_finds_two_neighbouring_tokens_of_values_in_the_halves_of_a_word():
    page = layout(4, 4, 128)
    values = page.byte_offsets[:, 64:128].astype(int) - 1024
    # A lane's first 16 dimensions, 8 bytes of each token: tokens 0 and 1 of pair 0, then 8 and 9.
    assert values[0, :8].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert values[1, :8].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert values[8, :8].tolist() == [512 + x for x in [0, 1, 4, 5, 8, 9, 12, 13]]
    assert values[2, 0] == 16  # the next pair of tokens: the next lane
    assert values[0, 8] == 64  # the next 16 dimensions: four lanes on


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_pages_are_multiples_of_64_bytes(width, head_dim):
    assert layout(width, 2, head_dim, block_size=16).page_bytes % 64 == 0
    assert layout(2, width, head_dim, block_size=32).page_bytes % 128 == 0


def test_bits_per_element_count_the_scales():
    assert layout(4, 4, 128).bits_per_element == 4.125
    assert layout(8, 6, 64).bits_per_element == 7.25


def test_bits_per_element_count_the_padding_of_a_head_dim_that_is_padded():
    page = layout(4, 4, 72)
    assert page.dim == 96
    assert page.bits_per_element == pytest.approx((8 * 96 + 32) / (2 * 72))


@pytest.mark.parametrize("head_dim", [0, -64, 7, 1025, 64.0, "64"])
def test_a_head_dim_that_cannot_be_rotated_is_refused(head_dim):
    with pytest.raises(ValueError, match="cannot be rotated: allowed are integers from 8 to 1024"):
        layout(head_dim=head_dim)
