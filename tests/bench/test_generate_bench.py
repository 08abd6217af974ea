import heavy
import pytest
from mlx_lm.models import llama

from vllm_metal_tq.bench import clock, generate
from vllm_metal_tq.config import TurboQuantConfig


@pytest.fixture
def bench(monkeypatch):
    tiny = llama.ModelArgs(
        model_type="llama",
        rms_norm_eps=1e-5,
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
    )
    monkeypatch.setitem(generate.MODEL_SHAPES, "tiny", tiny)
    return generate.GenerateBench("tiny", TurboQuantConfig.from_names())


def test_what_is_timed_has_been_evaluated(bench):
    bench.model.__class__ = heavy.Heavy
    case = bench.run("bf16", 1, 64)
    assert 1 / case["tokens_per_s"] > heavy.least_seconds()


@pytest.mark.parametrize("cache", ["bf16", "mlx_lm 8-bit", "mlx_lm 4-bit", "tq4"])
def test_a_case_decodes_as_many_tokens_as_are_timed(bench, cache):
    made = []
    make = bench.makers[cache]
    bench.makers[cache] = lambda model: made.extend(make(model)) or made
    case = bench.run(cache, 1, 64)
    assert case["skipped"] is None
    assert {c.offset for c in made} == {64 + 1 + clock.STREAMED}
    assert case["kv_bytes"] == sum(c.nbytes for c in made)
