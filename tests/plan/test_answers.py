import pytest

from vllm_metal_tq.config import PRESETS, TurboQuantConfig
from vllm_metal_tq.plan import machine, models
from vllm_metal_tq.plan.caches import MlxCache, Scheme, Unsupported, VllmCache
from vllm_metal_tq.plan.plan import Question, plan, schemes
from vllm_metal_tq.plan.sources import shipped
from vllm_metal_tq.tail import TAIL

BUDGET = 1_270_784_000
"""Bytes: the 6,205 blocks of 16 tokens of vllm-metal's q8_0/q3_0 (99,280 tokens), each token 100
bytes for each of 16 * 8 KV heads. That vllm-metal's documentation gives 38,768 tokens for bf16 and
99,280 for q8_0/q3_0 in the same memory puts its budget within 0.1 % of this."""

LATENTS = {
    **{"model_type": "deepseek_v3", "hidden_size": 128, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "kv_lora_rank": 512},
    **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 64},
}


def model(name):
    return models.read(name, shipped()[name]["config"])


def tq(k_width, v_width):
    config = TurboQuantConfig(k_width, v_width)
    return Scheme(config.label, config)


def made(name="llama-3.2-1b", memory=8 * machine.GIB, extra=None, **asked):
    return plan(Question(model(name), machine.estimated(memory), **asked), schemes(extra))


def row(answer, name):
    (found,) = [row for row in answer.rows if row.scheme.name == name]
    return found


def test_llama_3_2_1b_goes_from_38768_to_99280_tokens_in_vllm_metal_and_to_146000_with_tq4():
    llama = model("llama-3.2-1b")
    theirs = BUDGET // (16 * 16 * 8 * 100)  # bytes of a token and KV head: DESIGN.md, research/
    blocks = {
        each.name: BUDGET // VllmCache(llama, each).block_bytes
        for each in (Scheme("bf16"), tq(8, 3), tq(4, 4))
    }
    assert {name: 16 * count for name, count in blocks.items()} == {
        "bf16": 38_768,
        "q8_0/q3_0": 107_904,
        "tq4": 146_000,
    }
    assert 16 * theirs == 99_280
    assert theirs / blocks["bf16"] == pytest.approx(2.56, rel=1e-3)


@pytest.mark.parametrize(
    ("engine", "contexts"),
    [
        ("mlx_lm", {"bf16": 38_656, "q8_0/q3_0": 107_824, "tq4": 145_872}),
        ("vllm", {"bf16": 38_752, "q8_0/q3_0": 91_824, "tq4": 118_080}),
    ],
)
def test_one_request_of_llama_3_2_1b_in_the_same_memory(engine, contexts):
    extra = TurboQuantConfig(8, 3)
    answer = made(engine=engine, kv_budget=BUDGET, extra=extra)
    assert {name: row(answer, name).max_context for name in contexts} == contexts


def test_the_plugin_holds_out_tails_and_a_layer_s_past():
    cache = VllmCache(model("llama-3.2-1b"), tq(4, 4))
    tails = 16 * 2 * TAIL * 8 * 64 * 2
    assert cache.held_out(8192, 3) == 3 * tails + 8192 * 2 * 8 * 64 * 2
    assert VllmCache(model("llama-3.2-1b"), Scheme("bf16")).held_out(8192, 3) == 0


def test_vllm_metal_holds_out_states_while_their_pool_grows():
    cache = VllmCache(model("qwen3.5-9b"), Scheme("bf16"))
    states = 24 * 2_146_304
    assert [cache.held_out(8192, count) for count in (1, 2, 9)] == [states, 3 * states, 3 * states]


@pytest.mark.parametrize("engine", [MlxCache, VllmCache])
@pytest.mark.parametrize("name", ["bf16", *PRESETS])
def test_the_longest_context_fits_and_one_token_more_does_not(engine, name):
    kind = {MlxCache: "mlx_lm", VllmCache: "vllm"}[engine]
    answer = row(made(engine=kind, kv_budget=BUDGET), name)
    assert answer.cache.nbytes(answer.max_context) <= BUDGET
    assert answer.cache.nbytes(answer.max_context + 1) > BUDGET
    assert answer.cache.nbytes(4096, answer.max_concurrency) <= BUDGET
    assert answer.cache.nbytes(4096, answer.max_concurrency + 1) > BUDGET


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (4096, 256)])
def test_whole_blocks_are_counted(tokens, blocks):
    cache = MlxCache(model("llama-3.2-1b"), tq(4, 4))
    assert cache.nbytes(tokens) == blocks * 16 * 16 * 8 * 68 + (1 << 20)
    assert cache.nbytes(tokens, 3) == 3 * cache.nbytes(tokens)


def test_mlx_lm_s_own_caches_grow_by_256_tokens():
    cache = MlxCache(model("llama-3.2-1b"), Scheme("bf16"))
    assert cache.nbytes(1) == cache.nbytes(256) == 256 * 32_768
    assert cache.nbytes(257) == 512 * 32_768


def test_a_window_is_bounded():
    gemma = model("gemma-3-1b")
    cache = MlxCache(gemma, tq(4, 4))
    full = sum(not layer.window for layer in gemma.layers)
    tails = 26 * 32 * 1024
    assert cache.nbytes(512) == tails + 26 * 512 * 260
    # What a query sees, 8 tokens that can be trimmed, and blocks that are not full.
    assert cache.nbytes(50_000) == tails + (22 * 544 + full * 50_000) * 260
    assert cache.token_bytes == full * 260


def test_a_model_of_windows_alone_has_no_longest_context():
    config = shipped()["gemma-3-1b"]["config"]
    windows = config | {"layer_types": ["sliding_attention"] * 26}
    answer = plan(
        Question(models.read("windows", windows), machine.estimated(8 * machine.GIB)), schemes()
    )
    assert row(answer, "bf16").max_context is None
    assert row(answer, "tq4").max_context is None
    assert row(answer, "tq4").note == ""
    assert answer.decode_context == 32_768


def test_a_state_is_the_same_for_every_length():
    cache = MlxCache(model("qwen3.5-9b"), Scheme("bf16"))
    states = 24 * 2_146_304
    assert cache.nbytes(256) == states + 256 * 32_768
    assert cache.nbytes(256, 2) == 2 * cache.nbytes(256)


@pytest.mark.parametrize("engine", ["mlx_lm", "vllm"])
def test_latents_are_not_compressed(engine):
    latents = models.read("latents", LATENTS)
    question = Question(latents, machine.estimated(8 * machine.GIB), engine=engine)
    answer = plan(question, schemes())
    bf16, tq4 = row(answer, "bf16"), row(answer, "tq4")
    assert bf16.cache.token_bytes == 2 * 2 * (512 + 64)
    if engine == "mlx_lm":
        assert tq4.note == "compresses 0 of 2 layers"
        assert tq4.cache.token_bytes == bf16.cache.token_bytes
    else:
        assert (tq4.cache, tq4.note) == (None, "the plugin refuses latents (MLA)")


@pytest.mark.parametrize(
    ("name", "engine", "scheme", "reason"),
    [
        ("gemma-3-1b", MlxCache, Scheme("", mlx_bits=4), "no sliding windows"),
        ("llama-3.2-1b", VllmCache, Scheme("", mlx_bits=4), "does not offer it"),
    ],
)
def test_what_an_engine_does_not_offer_says_why(name, engine, scheme, reason):
    with pytest.raises(Unsupported, match=reason):
        engine(model(name), scheme)


def test_what_mlx_lm_layers_share_is_compressed():
    answer = made("gemma-4-e2b", memory=16 * machine.GIB)
    tq4 = row(answer, "tq4")
    assert not tq4.note
    assert tq4.bytes_per_token == 3 * 516


def test_vllm_keeps_the_whole_context_of_windows():
    gemma = model("gemma-3-1b")
    assert VllmCache(gemma, tq(4, 4)).token_bytes == 26 * 260
    assert MlxCache(gemma, tq(4, 4)).token_bytes == 4 * 260


def test_states_take_a_block_of_each_group_in_vllm():
    cache = VllmCache(model("qwen3.5-9b"), Scheme("bf16"))
    assert cache.block_size == 528  # 2,146,304 bytes of a state over 4,096 of a token, rounded up
    # 24 states in groups of 8, one of attention, and the block that vLLM keeps.
    blocks = [(cache.nbytes(tokens) - 24 * 2_146_304) / cache.block_bytes for tokens in (528, 529)]
    assert blocks == [3 + 1 + 1, 3 + 2 + 1]


def test_a_decode_step_reads_a_window_of_what_is_kept():
    cache = VllmCache(model("gemma-3-1b"), Scheme("bf16"))
    assert cache.read_bytes(100) == 26 * 100 * 1024
    assert cache.read_bytes(10_000) == (4 * 10_000 + 22 * 512) * 1024


def test_a_context_and_a_concurrency_fit_or_do_not():
    answer = made(kv_budget=BUDGET, context=32_768, concurrency=4)
    fits = {each.scheme.name: each.fits for each in answer.rows}
    assert (fits["bf16"], fits["tq8"], fits["tq4"]) == (False, False, True)
    assert row(answer, "tq4").max_context >= 32_768
    assert row(answer, "tq4").max_concurrency >= 4
    assert row(made(), "tq4").fits is None


def test_speed_is_bytes_over_bandwidth():
    answer = made(context=8192, bandwidth=68.25e9)
    bf16 = 2 * 1_235_814_400 + 8192 * 32_768
    assert answer.decode_rate(row(answer, "bf16")) == pytest.approx(68.25e9 / bf16)
    two = made(context=8192, bandwidth=68.25e9, concurrency=2)
    assert two.decode_rate(row(two, "bf16")) == pytest.approx(2 * 68.25e9 / (bf16 + 8192 * 32_768))


def test_speeds_are_compared_at_a_context_for_which_every_row_has_room():
    answer = made(kv_budget=BUDGET, bandwidth=68.25e9)
    assert answer.decode_context == row(answer, "bf16").max_context
    assert answer.decode_rate(row(answer, "tq4")) > answer.decode_rate(row(answer, "bf16"))
    nothing = made(kv_budget=1, bandwidth=68.25e9)
    assert nothing.decode_context is None
    assert {each.max_context for each in nothing.rows} == {0}


def test_files_that_are_here_say_how_large_the_weights_are():
    assert made(file_bytes=700_000_000).question.weight_bytes == 700_000_000
    assert made(file_bytes=700_000_000, weights_bits=16).question.weight_bytes == 2_471_628_800


def test_weights_that_leave_nothing_are_an_error_that_names_both():
    message = r"weights of llama-3.1-8b take 14.96 GiB.*may use 5.33 GiB of 8 GiB of memory"
    with pytest.raises(ValueError, match=message):
        made("llama-3.1-8b")
    assert row(made("llama-3.1-8b", weights_bits=4), "tq4").max_context > 8192
