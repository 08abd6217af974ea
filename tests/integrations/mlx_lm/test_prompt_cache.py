import mlx.core as mx
import mlx_lm.models.cache as host
import pytest
from kinds import KINDS
from models import PROMPT, build, greedy, llama, tokens

from vllm_metal_tq import TurboQuantConfig, TurboQuantKVCache, make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm import calibrate, report
from vllm_metal_tq.tail import Tail


@pytest.fixture(scope="module")
def model():
    return llama()


def test_bytes_reported_are_bytes_allocated(model):
    cache = make_prompt_cache(model, TurboQuantConfig.from_names("tq4"))
    assert report(cache).kv_bytes == 0
    model(tokens(300), cache=cache)
    dense = host.make_prompt_cache(model)
    model(tokens(300), cache=dense)
    held = report(cache)
    pages, tails = 3 * 2 * 512 * 68, 3 * 2 * 32 * 2 * 64 * 4  # float32 here
    assert sum(c.pool.pages.nbytes for c in cache) == pages
    assert held.kv_bytes == pages + tails
    # mlx_lm's cache has room for as many tokens, in float32 here.
    assert held.kv_bytes_bf16 == sum(c.nbytes for c in dense) / 2
    assert held.ratio == held.kv_bytes_bf16 / held.kv_bytes
    assert (held.layers, held.layers_compressed) == (3, 3)


def test_layers_may_have_widths_of_their_own(model):
    config = TurboQuantConfig.from_names("tq4", block_size=32, layers="0=tq8,2=q3_0/q2_0")
    cache = make_prompt_cache(model, config)
    widths = [(8, 6, 32), (4, 4, 32), (3, 2, 32)]
    assert [c.layout.config for c in cache] == [TurboQuantConfig(*w) for w in widths]
    assert len(greedy(model, cache)) == 12
    with pytest.raises(ValueError, match="there is no layer 3: the model has 3"):
        make_prompt_cache(model, TurboQuantConfig.from_names(layers="2-3=tq8"))


def test_layers_that_are_not_compressed_count_as_they_are():
    kind = next(kind for kind in KINDS if kind.model_type == "lfm2")
    model = build(kind.model_type, **kind.fields)
    cache = make_prompt_cache(model)
    model(tokens(20), cache=cache)
    held = report(cache)
    dense = sum(c.nbytes for c in cache[::2])
    assert (held.layers, held.layers_compressed) == (4, 2)
    assert held.kv_bytes == dense + sum(
        c.pool.nbytes + c.sequences.tail.nbytes for c in cache[1::2]
    )
    assert held.kv_bytes_bf16 == dense + sum(c.pool.nbytes_bf16 for c in cache[1::2])


class TestState:
    @pytest.fixture
    def cache(self, model):
        cache = make_prompt_cache(model, TurboQuantConfig(4, 3, 32))
        model(tokens(PROMPT), cache=cache)
        return cache[0]

    def test_scales_that_are_not_finite_are_refused(self, cache):
        pages, *rest = cache.state
        with pytest.raises(ValueError, match="scales that are not finite"):
            TurboQuantKVCache.from_state((mx.full(pages.shape, 255, mx.uint8), *rest))

    @pytest.mark.parametrize(
        ("place", "number"),
        [
            *((0, 1), (1, 7), (3, 24), (4, 72), (5, 3), (7, -1), (8, 41), (9, 41), (9, -1)),
            *((10, 33), (10, 0), (11, 1), (11, 2), (-1, 99)),
        ],
    )
    def test_a_header_that_contradicts_its_pages_is_refused(self, cache, place, number):
        pages, header, *rest = cache.state
        header[place] = number
        with pytest.raises(ValueError, match=r"unknown|do not fit"):
            TurboQuantKVCache.from_state((pages, header, *rest))

    def test_a_window_that_lacks_tokens_is_refused(self, cache):
        pages, header, *rest = cache.state
        header[7], header[8] = PROMPT + 1, PROMPT + 16  # of which PROMPT are there
        TurboQuantKVCache.from_state((pages, header, *rest))
        header[7] += 1
        with pytest.raises(ValueError, match="do not fit"):
            TurboQuantKVCache.from_state((pages, header, *rest))

    def test_the_version_before_windows_can_be_read(self, cache):
        pages, header, *rest = cache.state
        numbers = header.tolist()
        earlier = mx.array([3, *numbers[1:7], *numbers[8:12], *numbers[13:]], mx.int32)
        again = TurboQuantKVCache.from_state((pages, earlier, *rest))
        assert mx.array_equal(again.state[1], header)

    @pytest.mark.parametrize(
        "change",
        [
            lambda header: header.astype(mx.float32),
            lambda header: header.astype(mx.int64),
            lambda header: header[None],
            lambda header: header[:8],
            lambda header: header[:0],
        ],
    )
    def test_a_header_that_is_none_is_refused(self, cache, change):
        pages, header, *rest = cache.state
        with pytest.raises(ValueError, match="is none of a cache"):
            TurboQuantKVCache.from_state((pages, change(header), *rest))

    def test_a_position_that_differs_from_the_tokens_needs_a_limit(self, cache):
        pages, header, *rest = cache.state
        header[8] = 2**31 - 1
        with pytest.raises(ValueError, match="do not fit"):
            TurboQuantKVCache.from_state((pages, header, *rest))

    def test_a_tail_of_other_numbers_is_refused(self, cache):
        pages, header, keys, values = cache.state
        with pytest.raises(ValueError, match="do not fit"):
            TurboQuantKVCache.from_state((pages, header, keys.astype(mx.int32), values))
        values[0, 0, 3, 5] = mx.nan
        with pytest.raises(ValueError, match="the tail holds elements that are not finite"):
            TurboQuantKVCache.from_state((pages, header, keys, values))

    def test_a_centre_that_cannot_be_is_refused(self, model):
        cache = make_prompt_cache(model, calibration=calibrate(model, tokens(100)[0].tolist()))
        model(tokens(PROMPT), cache=cache)
        pages, header, *rest = cache[1].state
        rest[-2] = -rest[-2]  # the smoothing
        with pytest.raises(ValueError, match="no centre of 2 KV heads"):
            TurboQuantKVCache.from_state((pages, header, *rest))

    def test_a_lost_tail_loses_nothing_stored(self, cache):
        before, cache.sequences.tail = cache.state, Tail()
        pages, header, *rest = cache.state
        assert rest == []
        assert mx.array_equal(pages, before[0])
        assert mx.array_equal(header[:10], before[1][:10])
        assert TurboQuantKVCache.from_state((pages, header)).size() == cache.size()
