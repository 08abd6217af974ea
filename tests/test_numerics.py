"""Numbers at their limits: what is stored and attended to, or refused with nothing stored."""

import centres
import mlx.core as mx
import numpy as np
import pytest
from gpu import where_the_host_looks
from kernels.reference import turned_means

from vllm_metal_tq import attention, centre, codec, cpu, dispatch
from vllm_metal_tq.config import T2, T3, WIDTHS, TurboQuantConfig
from vllm_metal_tq.integrations.vllm.paged import EnginePool, PagedLayer, Segment
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import BlockTable, PagePool
from vllm_metal_tq.rotation import rotate, unrotate
from vllm_metal_tq.sequences import Sequences
from vllm_metal_tq.tail import TAIL

HEADS, DIM, SCALE = 2, 64, 0.125
LAYOUT = PageLayout(TurboQuantConfig(4, 4), DIM)
DTYPES = [mx.float16, mx.bfloat16, mx.float32]
LARGEST = 65504.0  # of fp16


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def sequences(layout=LAYOUT, **options):
    return Sequences(PagePool(layout, HEADS), **options)


def attended(some, keys, values, queries=None):
    """Store tokens one at a time, and what the last of them attends to."""
    queries = normal(1, HEADS, keys.shape[2], DIM, seed=9) if queries is None else queries
    for i in range(keys.shape[2]):
        parts = [x[:, :, i : i + 1] for x in (queries, keys, values)]
        some.store(*parts[1:])
        out = some.attend(*parts, scale=SCALE)
    return out


def decoded(keys, values, layout):
    """Keys and values as pages give them back, ``(tokens, head_dim)`` each."""
    table = BlockTable(PagePool(layout, 1))
    table.append(codec.encode(keys[None], values[None], layout))
    parts = codec.decode(table.read(len(keys)), layout)
    return [unrotate(x.flatten(1, 2), keys.shape[-1])[0, : len(keys)] for x in parts]


class TestWhatIsNoNumber:
    @where_the_host_looks
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("which", ["keys", "values"])
    @pytest.mark.parametrize("at", [0, 40])
    @pytest.mark.parametrize("centred", [False, True])
    def test_it_is_refused_and_nothing_is_stored(self, bad, which, at, centred):
        some = sequences(centre=centres.random(HEADS, DIM) if centred else None)
        good = normal(1, HEADS, 41, DIM)
        some.store(good, good)
        pages, tail = np.array(some.pool.pages), np.array(some.tail.arrays[0])
        wrong = mx.array(good)
        wrong[0, 1, at, 7] = bad
        chunk = {"keys": good, "values": good} | {which: wrong}
        with pytest.raises(ValueError, match=f"cannot encode: {which} hold"):
            some.store(chunk["keys"], chunk["values"])
        assert (some.offsets, some.lengths, some.tail.lengths) == ([41], [41], [TAIL])
        assert np.array_equal(np.array(some.pool.pages), pages)
        assert np.array_equal(np.array(some.tail.arrays[0]), tail)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_query_that_is_none_spoils_its_own_output_alone(self, bad):
        some, keys = sequences(), normal(1, HEADS, 50, DIM)
        attended(some, keys, keys)
        wrong = normal(1, HEADS, 1, DIM)
        wrong[0, 1, 0, 3] = bad
        next_ = normal(1, HEADS, 1, DIM, seed=4)
        some.store(next_, next_)
        out = some.attend(wrong, next_, next_, scale=SCALE)
        assert np.isfinite(np.array(out[0, 0])).all()
        assert not np.isfinite(np.array(out[0, 1])).all()


class TestSmallNumbers:
    @pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_denormals_decode_to_zeros(self, size, width):
        x = mx.array(np.full((4, DIM), size, np.float32))
        for part in decoded(x, x, PageLayout(TurboQuantConfig(width, width), DIM)):
            assert not np.array(part).any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keys_that_are_zeros_make_all_weights_equal(self, dtype):
        zeros = mx.zeros((1, HEADS, 70, DIM), dtype)
        values = normal(1, HEADS, 70, DIM).astype(dtype)
        out = attended(sequences(), zeros, values, normal(1, HEADS, 70, DIM).astype(dtype))
        mean = np.array(values.astype(mx.float32)).mean(axis=2, keepdims=True)
        assert out.dtype == dtype
        assert np.abs(np.array(out.astype(mx.float32)) - mean).max() < 0.03

    def test_values_that_are_zeros_come_out_as_zeros(self):
        keys = normal(1, HEADS, 70, DIM)
        assert not np.array(attended(sequences(), keys, mx.zeros_like(keys))).any()


class TestLargeNumbers:
    @pytest.mark.parametrize("bits", [4, 5, 6, 8])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keys_of_the_largest_elements_are_stored_from_4_bits_on(self, bits, dtype):
        keys = (LARGEST * mx.sign(normal(20, DIM))).astype(dtype)
        layout = PageLayout(TurboQuantConfig(bits, 4), DIM)
        stored, small = (decoded(x, normal(20, DIM), layout)[0] for x in (keys, keys / LARGEST))
        error = np.linalg.norm(np.array(stored) / LARGEST - np.array(small))
        assert error < 5e-3 * np.linalg.norm(np.array(small))

    @where_the_host_looks
    @pytest.mark.parametrize(("k_width", "sizes"), [(2, (LARGEST, 0)), (4, (8 * LARGEST, 0))])
    @pytest.mark.parametrize("swapped", [False, True])
    def test_what_needs_a_longer_scale_is_refused_and_nothing_is_stored(
        self, k_width, sizes, swapped
    ):
        some = sequences(PageLayout(TurboQuantConfig(k_width, 4), DIM))
        chunk = [size * mx.sign(normal(1, HEADS, 20, DIM)) for size in sizes]
        with pytest.raises(ValueError, match=r"too long for an fp16 scale .largest: 65504"):
            some.store(*(chunk[::-1] if swapped else chunk))
        assert (some.offsets, some.lengths, some.pool.num_blocks) == ([0], [0], 0)

    @pytest.mark.parametrize("element", [1.0, -300.0, 8000.0])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_constant_vectors_come_back(self, element, width):
        x = mx.full((3, DIM), element)
        keys, values = decoded(x, x, PageLayout(TurboQuantConfig(width, width), DIM))
        for part in (keys, values):
            error = np.linalg.norm(np.array(part) - element) / np.linalg.norm(np.array(x))
            bounds = {2: 0.45, 3: 0.25, 4: 0.15, 5: 0.08, 6: 0.04, 8: 0.015, T2: 0.4, T3: 0.2}
            assert error < bounds[width]

    @pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
    def test_logits_far_beyond_fp16_pick_the_largest(self, dtype):
        keys = normal(1, HEADS, 70, DIM) * 1e3
        keys[:, :, 10] = mx.abs(keys[:, :, 10]) + 3e3
        values = normal(1, HEADS, 70, DIM, seed=1).astype(dtype)
        queries = mx.full((1, HEADS, 70, DIM), 1e3)
        out = attended(sequences(), *(x.astype(dtype) for x in (keys, values, queries)))
        expected = decoded(values[0, 0], values[0, 0], LAYOUT)[1][10]
        assert np.abs(np.array(out[0, 0, 0].astype(mx.float32)) - np.array(expected)).max() < 0.02

    def test_values_whose_scales_times_weights_are_beyond_fp16(self):
        """Weights are up to 64 before they are normalised: the product does not fit a half."""
        keys, values = rising(120)
        past = [x[None] for x in stored(keys, values)]
        q = mx.ones((1, 1, 1, DIM))
        table = BlockTable(PagePool(LAYOUT, 1))
        table.append(codec.encode(keys, values, LAYOUT))
        recent = mx.zeros((1, 1, 1, DIM))
        got = cpu.attend_token(
            q, recent, recent, table.pool.pages, table.blocks, 120, LAYOUT, scale=1.0
        )
        past = [mx.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]) for x in past]
        want = attention.attend(q, recent, recent, past, scale=1.0)
        assert np.isfinite(np.array(want)).all()
        assert np.abs(np.array(got - want)).max() < 1e-4 * np.abs(np.array(want)).max()


def rising(count: int):
    """Keys whose logits for a query of ones rise by a little each, and large values."""
    rise = mx.arange(count).reshape(1, count, 1) * (3.0 / DIM)
    return mx.broadcast_to(rise, (1, count, DIM)), 2e4 * mx.sign(normal(1, count, DIM))


def stored(keys, values):
    """Rotated keys and values as the codec gives them back."""
    table = BlockTable(PagePool(LAYOUT, 1))
    table.append(codec.encode(keys, values, LAYOUT))
    parts = codec.decode(table.read(keys.shape[1]), LAYOUT)
    return [x.flatten(1, 2)[:, : keys.shape[1]] for x in parts]


class TestEqualLogits:
    @pytest.mark.parametrize("sink", [None, 0.0])
    def test_the_output_is_the_mean_of_the_values(self, sink):
        some, keys = sequences(), normal(1, HEADS, 70, DIM)
        values, queries = normal(1, HEADS, 70, DIM, seed=1), mx.zeros((1, HEADS, 70, DIM))
        sinks = None if sink is None else mx.full((HEADS,), sink)
        some.store(keys[:, :, :69], values[:, :, :69])
        last = [x[:, :, 69:] for x in (queries, keys, values)]
        some.store(*last[1:])
        out = np.array(some.attend(*last, scale=SCALE, sinks=sinks))
        kept = np.array(values)
        past = decoded(values[0, 0, :38], values[0, 0, :38], LAYOUT)[1]
        expected = np.concatenate([np.array(past), kept[0, 0, 38:]]).sum(axis=0)
        expected /= 70 if sink is None else 71
        assert np.abs(out[0, 0, 0] - expected).max() < 1e-5


class TestContexts:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_one_token_is_that_token(self, dtype):
        q, k, v = (normal(1, HEADS, 1, DIM, seed=i).astype(dtype) for i in range(3))
        some = sequences()
        some.store(k, v)
        for _ in range(2):
            difference = mx.abs(some.attend(q, k, v, scale=SCALE) - v).max().item()
            assert difference < {mx.float32: 1e-6}.get(dtype, 1e-2)
            some.store(k, v)

    def test_of_a_million_tokens_that_repeat_is_that_of_one_repetition(self):
        """One block table of 65,536 entries over four blocks."""
        layout = PageLayout(TurboQuantConfig(4, 4), 8)
        table = BlockTable(PagePool(layout, 1))
        keys, values = normal(2, 1, 64, 8)
        table.append(codec.encode(keys, values, layout))
        q, v = normal(2, 1, 2, 1, 8, seed=1)
        far = mx.full((1, 1, 1, 8), -1e4) * mx.sign(q[:, :1])  # a weight of 0
        options = {"scale": 1.0}
        recent = far, v[:, :1]
        once = cpu.attend_token(
            q[:, :1], *recent, table.pool.pages, table.blocks, 64, layout, **options
        )
        million = cpu.attend_token(
            q[:, :1], *recent, table.pool.pages, table.blocks * 16384, 1 << 20, layout, **options
        )
        assert np.abs(np.array(once - million)).max() < 1e-4


FAR = [0, 1, 2**20 - 1, 2**20, 10**6 + 7, 2**24 + 1, 2**30 + 3, 2**31 - 1024]


class TestFarPositions:
    @pytest.mark.parametrize("position", FAR)
    def test_phases_are_exact(self, position):
        steps = np.array([0, 1, 3, 2**31, 2**32 - 1, 683565276], np.uint32)
        got = np.array(centre.phases(mx.array([position], mx.int32), mx.array(steps)))[0]
        whole = [position * int(step) % 2**32 for step in steps]
        signed = np.array([w - 2**32 if w >= 2**31 else w for w in whole], np.float64)
        assert np.abs(got - signed * (2 * np.pi / 2**32)).max() <= 4e-7

    @pytest.mark.parametrize("position", FAR)
    def test_a_key_is_centred_and_comes_back(self, position):
        found = centres.random(HEADS, DIM)
        positions = mx.arange(position, position + 16)
        means = turned_means(found, np.arange(position, position + 16))
        keys = mx.array(means.astype(np.float32)) + 0.01 * normal(HEADS, 16, DIM)
        rows = codec.encode(keys, keys, LAYOUT, found, positions)
        table = BlockTable(PagePool(LAYOUT, HEADS))
        table.append(rows)
        back, _ = codec.decode(table.read(16), LAYOUT, found, positions)
        smoothed = rotate(keys * found.smoothing[:, None])
        error = np.linalg.norm(np.array(back[:, 0] - smoothed)) / np.linalg.norm(np.array(smoothed))
        assert error < 0.01

    @pytest.mark.parametrize("position", FAR)
    def test_decoding_in_numpy_is_the_oracles(self, position):
        found, count = centres.random(HEADS, DIM), 600  # over a slice's end
        positions = mx.arange(position, position + count)
        keys, values = centres.typical(found, count, position, 3)
        table = BlockTable(PagePool(LAYOUT, HEADS))
        table.append(codec.encode(keys, values, LAYOUT, found, positions))
        q, k, v = (normal(1, HEADS, 1, DIM, seed=i) for i in range(3))
        slots = mx.arange(position, position + len(table.blocks) * 16)
        past = codec.decode(table.read(count), LAYOUT, found, slots)
        past = [x.flatten(1, 2)[None, :, :count] for x in past]
        past = [mx.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]) for x in past]
        want = attention.attend(q, k, v, past, scale=SCALE, centre=found)
        pages = table.pool.pages, table.blocks, count, LAYOUT
        got = cpu.attend_token(q, k, v, *pages, scale=SCALE, centre=found, shift=position)
        assert np.abs(np.array(got - want)).max() < 2e-5


class TestBlocksThatAreNotThere:
    """The host refuses them before anything runs: a kernel would read beyond the pages."""

    BAD = (-1, 20, 2**31 - 1, -(2**31))

    @pytest.fixture
    def pool(self):
        table = BlockTable(PagePool(LAYOUT, HEADS))
        table.append(codec.encode(*(normal(HEADS, 40, DIM, seed=i) for i in (0, 1)), LAYOUT))
        assert table.pool.num_blocks == 16
        return table.pool

    @pytest.mark.parametrize("bad", BAD)
    def test_for_reading(self, pool, bad):
        with pytest.raises(ValueError, match=f"there is no block {bad}: the pool has 16"):
            pool.read([0, bad])

    @pytest.mark.parametrize("bad", BAD)
    def test_for_writing(self, pool, bad):
        before = np.array(pool.pages)
        with pytest.raises(ValueError, match=f"there is no block {bad}"):
            pool.write(((bad * 16 + 3,),), mx.zeros((1, HEADS, 1, LAYOUT.row_bytes), mx.uint8))
        with pytest.raises(ValueError, match=f"there is no block {bad}"):
            pool.put([bad], pool.read([0]).swapaxes(0, 1))
        assert np.array_equal(np.array(pool.pages), before)

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("length", [1, 3])
    def test_for_attending(self, pool, bad, length):
        parts = (normal(1, HEADS, length, DIM, seed=i) for i in range(3))
        with pytest.raises(ValueError, match=f"there is no block {bad}"):
            dispatch.attend(*parts, pool, [0, 1, bad], 40, scale=SCALE, mask="causal")

    def test_for_a_past_that_is_longer_than_its_blocks(self, pool):
        parts = (normal(1, HEADS, 1, DIM, seed=i) for i in range(3))
        with pytest.raises(ValueError, match="33 tokens are more than 2 blocks hold"):
            dispatch.attend(*parts, pool, [0, 1], 33, scale=SCALE)

    @pytest.mark.parametrize("bad", BAD)
    def test_from_an_engine(self, bad):
        layer = PagedLayer(EnginePool(LAYOUT, HEADS, 16))
        x = normal(1, HEADS, 20, DIM)
        with pytest.raises(ValueError, match=f"there is no block {bad}"):
            layer.attend(x, x, x, [Segment("a", slice(0, 20), 0, [3, bad])], scale=SCALE)
        with pytest.raises(ValueError, match=f"there is no block {bad}"):
            layer.pool.copy_blocks([(bad, 1)])
        with pytest.raises(ValueError, match=f"there is no block {bad}"):
            layer.pool.copy_blocks([(1, bad)])
        assert not np.array(layer.pool.pages).any()

    @pytest.mark.parametrize(("offset", "blocks"), [(0, [3]), (20, [3, 4]), (-1, [3, 4])])
    def test_from_an_engine_that_gives_too_few(self, offset, blocks):
        layer = PagedLayer(EnginePool(LAYOUT, HEADS, 16))
        x = normal(1, HEADS, 20, DIM)
        with pytest.raises(ValueError, match=f"blocks of 16 tokens for 20 tokens after {offset}"):
            layer.attend(x, x, x, [Segment("a", slice(0, 20), offset, blocks)], scale=SCALE)

    def test_that_an_engine_adds_later(self):
        layer, blocks = PagedLayer(EnginePool(LAYOUT, HEADS, 16)), [3]
        x = normal(1, HEADS, 16, DIM)
        layer.attend(x, x, x, [Segment("a", slice(0, 16), 0, blocks)], scale=SCALE)
        blocks.append(16)
        one = x[:, :, :1]
        with pytest.raises(ValueError, match="there is no block 16"):
            layer.attend(one, one, one, [Segment("a", slice(0, 1), 16, blocks)], scale=SCALE)
