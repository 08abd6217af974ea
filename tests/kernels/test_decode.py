import mlx.core as mx
import pytest
from kernels.reference import Case, float64

from vllm_metal_tq.config import T2, T3, WIDTHS
from vllm_metal_tq.kernels.decode import decode

BOUND = 5e-4
F32 = {"dtype": mx.float32}


@pytest.fixture(params=["mma", "fma"])
def variant(request):
    return request.param


@pytest.mark.parametrize("length", [1, 15, 16, 17, 333])
def test_contexts_with_whole_and_partial_sub_blocks(length, variant, execute):
    assert Case([length], **F32).error(decode, variant=variant, execute=execute) < BOUND


# k_width, v_width, head_dim, block_size
BYTES = [
    # Up to 64 dimensions, where a lane takes half as many of them as above.
    *((2, 3, 64, 16), (3, 2, 64, 32), (4, 5, 64, 16), (5, 4, 64, 32), (6, 8, 64, 16)),
    *((8, 6, 64, 32), (3, 5, 32, 16)),
    # One unit; 80 is padded to 96, whose rotation is no power of two.
    *((2, 8, 128, 16), (3, 6, 128, 32), (5, 2, 128, 16), (6, 5, 128, 32), (8, 3, 128, 16)),
    *((4, 4, 128, 32), (6, 3, 96, 16), (4, 2, 80, 16)),
    # Two units.
    *((8, 5, 160, 32), (2, 4, 192, 16), (5, 8, 224, 32), (3, 3, 256, 16), (4, 6, 256, 32)),
    # Trellis codes.
    *((T2, T3, 32, 16), (T3, T2, 64, 32), (T2, T2, 96, 16), (T3, T3, 128, 32), (T2, T3, 160, 16)),
    *((T3, T3, 192, 32), (T3, T2, 256, 16), (T2, 8, 64, 16), (6, T3, 128, 16), (T3, 3, 80, 32)),
    (4, T2, 224, 16),
]


def test_every_width_is_among_the_bytes():
    assert {k for k, *_ in BYTES} == {v for _, v, *_ in BYTES} == set(WIDTHS)


@pytest.mark.parametrize(("k_width", "v_width", "head_dim", "block_size"), BYTES)
def test_widths_and_head_dims(k_width, v_width, head_dim, block_size, variant, execute):
    case = Case([50, 5], widths=(k_width, v_width), head_dim=head_dim, block_size=block_size, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize(("widths", "head_dim"), [((T3, T2), 64), ((T2, T3), 128), ((T3, T3), 160)])
def test_trellis_codes_with_all_options(widths, head_dim, variant, execute):
    options = dict(rows=3, window=20, softcap=5.0, sparse_v=1e-9, tail=2, sinks=True)
    case = Case([90, 33, 1], widths=widths, head_dim=head_dim, heads=(6, 2), **options, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 10])
def test_query_heads_of_a_kv_head(group, variant, execute):
    case = Case([50, 17], heads=(2 * group, 2), **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_whose_lengths_have_fewer_and_more_than_8_elements(batch, variant, execute):
    lengths = [1 + 13 * i for i in range(batch)]
    assert Case(lengths, **F32).error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_rows_of_a_window_do_not_see_what_comes_after_them(rows, variant, execute):
    case = Case([rows, 90], rows=rows, heads=(6, 2), **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("window", [1, 9, 30, 1000])
def test_sliding_window(window, variant, execute):
    case = Case([90, 33], rows=4, window=window, tail=2, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("lengths", [[16], [0, 16]])
def test_a_window_that_begins_behind_all_pages(lengths, variant, execute):
    case = Case(lengths, heads=(2, 2), head_dim=64, tail=32, window=2, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


def test_nothing_to_attend_to_gives_zeros(variant, execute):
    case = Case([0, 20], head_dim=64)
    attended = case.attended(decode, variant=variant, execute=execute)
    assert not mx.abs(attended[0]).max().item()


def test_soft_cap(variant, execute):
    case = Case([90], softcap=5.0, loud=4.0, tail=1, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


def test_sinks(variant, execute):
    case = Case([90], sinks=True, tail=1, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


def test_a_tail_that_was_never_in_pages(variant, execute):
    case = Case([0, 40], rows=3, tail=5, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


def test_a_tail_whose_slots_wrap_around(variant, execute):
    case = Case([30, 63], rows=3, tail=32, **F32)
    assert case.error(decode, variant=variant, execute=execute) < BOUND


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_output_is_rounded_to_the_dtype_of_the_queries(dtype, variant, execute):
    case = Case([90], tail=1, dtype=dtype)
    assert case.attended(decode, variant=variant, execute=execute).dtype == dtype
    rounding = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
    assert case.error(decode, variant=variant, execute=execute) < BOUND + rounding


@pytest.mark.parametrize(("loud", "bound"), [(0.1, BOUND), (4.0, 2 * BOUND)])
def test_flat_and_peaked_attention(loud, bound, variant, execute):
    # Rotated queries are half floats, whose rounding grows with the spread of the logits.
    assert Case([333], loud=loud, **F32).error(decode, variant=variant, execute=execute) < bound


@pytest.mark.parametrize(("columns", "sparse_v"), [(1, 1e-3), (2, 1e-5)])
def test_sparse_v_errs_by_no_more_than_it_says(columns, sparse_v, variant, execute):
    # Two columns, and so small a fraction that it shows where only one of them is looked at.
    case = dict(heads=(columns, 1), loud=8.0, **F32)
    sparse, dense = Case([333] * 3, sparse_v=sparse_v, **case), Case([333] * 3, **case)
    got, want = (
        float64(c.attended(decode, variant=variant, execute=execute)) for c in (sparse, dense)
    )
    differences = abs(got - want).max(axis=(1, 2, 3))
    assert differences.any() or columns > 1
    for i, difference in enumerate(differences):
        _, values = sparse.tokens(i)
        assert difference <= 333 * sparse_v * abs(values).max()


def test_a_sequence_is_attended_the_same_alone_and_in_company(variant, execute):
    together = Case([40, 333, 77], **F32)
    got = together.attended(decode, variant=variant, execute=execute)
    alone = decode(
        together.queries[1:2],
        together.pool.pages,
        together.block_table[1:2],
        together.lengths[1:2],
        together.layout,
        together.options,
        max_tokens=333,
        variant=variant,
        execute=execute,
    )
    assert abs(float64(alone[0]) - float64(got[1])).max() < 1e-4
