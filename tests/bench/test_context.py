import heavy
import mlx.core as mx
import models
import pytest

from vllm_metal_tq.bench import clock, context
from vllm_metal_tq.bench.caches import BASELINES, bits_per_element, maker

LENGTHS = [100, 300, 600]
TEXT = models.tokens(600)[0].tolist()
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 64
BLOCK = 256  # tokens by which these caches grow
ELEMENTS = 2 * LAYERS * KV_HEADS * HEAD_DIM  # of a token


@pytest.fixture(scope="module")
def model():
    return models.llama()


def grown(model, cache, lengths=LENGTHS, limit_bytes=None):
    """The steps of a cache, why they ended, and its caches (those of the warm-up come first)."""
    made, steps = [], []

    def make(model):
        made.append(maker(cache)(model))
        return made[-1]

    work = context.grow(model, make, TEXT, lengths, limit_bytes)
    while True:
        try:
            steps.append(next(work))
        except StopIteration as end:
            return steps, end.value, made[-1]


@pytest.mark.parametrize("cache", [*BASELINES, "tq4"])
def test_a_cache_grows_to_every_length(model, cache):
    steps, stopped, caches = grown(model, cache)
    assert [step.context for step in steps] == LENGTHS
    assert stopped is None
    assert {c.offset for c in caches} == {600}
    for step in steps:
        assert step.peak_bytes > context.weight_bytes(model) + step.kv_bytes
        assert step.rss_bytes > step.peak_bytes
        assert min(step.prefill_tps, step.decode_tps) > 0


@pytest.mark.parametrize("cache", BASELINES)
def test_bytes_are_those_of_the_tokens_and_room_for_few(model, cache):
    # Keys are float32 here, and so are scales and biases, of which quantised caches have two.
    bits = 32 if cache == "bf16" else 2 * bits_per_element(cache) - int(cache.split()[1][0])
    for step in grown(model, cache)[0]:
        least = step.context * ELEMENTS * bits / 8
        assert least <= step.kv_bytes < least + BLOCK * ELEMENTS * bits / 8


def test_our_cache_is_smaller(model):
    dense, ours = (grown(model, cache)[0][-1].kv_bytes for cache in ("bf16", "tq4"))
    assert dense > 5 * ours  # of float32


def test_a_peak_is_that_of_its_own_step(model):
    mx.eval(mx.zeros((64 << 20,), mx.uint8))
    clock.release()
    assert mx.get_peak_memory() >= 64 << 20
    first, *_, last = grown(model, "bf16")[0]
    assert first.peak_bytes < last.peak_bytes < 16 << 20


def test_the_last_step_is_the_one_before_the_limit(model):
    free = grown(model, "bf16")[0]
    limit = (free[1].peak_bytes + free[2].peak_bytes) // 2
    steps, stopped, _ = grown(model, "bf16", limit_bytes=limit)
    assert [step.context for step in steps] == LENGTHS[:2]
    assert stopped.startswith("budget: 600 tokens peak at ")
    assert stopped.endswith(f" bytes, {limit:,} are allowed")


def test_what_is_timed_has_been_evaluated():
    (step,) = grown(heavy.model(), "bf16", [100])[0]
    seconds = heavy.least_seconds()
    assert 1 / step.decode_tps > seconds
    assert (100 - clock.STREAMED) / step.prefill_tps > seconds


def test_lengths_end_at_the_limit():
    assert context.contexts(1000, 3000) == [1000, 2000, 3000]
    assert context.contexts(1000, 3500) == [1000, 2000, 3000, 3500]
    assert context.contexts(1000, 500) == [500]
    # A step has room for the tokens that are decoded.
    assert context.contexts(1000, 3000 + context.LEAST_STEP - 1) == [1000, 2000, 3037]


def test_a_models_limit_and_dtype_are_its_own(model):
    assert context.model_limit(model) == 4096
    assert context.kv_dtype(model) == "float32"
    half = models.llama()
    half.set_dtype(mx.bfloat16)
    assert context.kv_dtype(half) == "bfloat16"
    assert context.weight_bytes(model) == 2 * context.weight_bytes(half)
    assert context.model_limit(object()) is None
