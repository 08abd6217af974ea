"""The real vLLM and vllm-metal over HTTP, uncompressed and with presets of ours."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files

import mlx.core as mx
import mlx_lm.models.cache
import pytest
from vllm_process import BLOCK_SIZE, CHUNK, MODEL, serve

from vllm_metal_tq import demo_model
from vllm_metal_tq.config import CALIBRATION_TOKENS, TurboQuantConfig
from vllm_metal_tq.integrations.mlx_lm import calibrate, make_prompt_cache
from vllm_metal_tq.integrations.vllm.settings import Settings
from vllm_metal_tq.layout import PageLayout

SETTINGS = {
    "dense": None,
    "tq4": {"turboquant": True, "preset": "tq4", "calibration": False},
    # Widths of its own for each half and for some layers; the calibration is made at start.
    "calibrated": {
        "turboquant": True,
        "k_quant": "q8_0",
        "v_quant": "q4_0",
        "layer_overrides": {"28-29": "tq6"},
    },
}
# vLLM leaves two layers at each end uncompressed where its own names are given.
ENDS_DENSE = SETTINGS["tq4"] | {"layer_overrides": {"0-1": "bf16", "28-29": "bf16"}}
CONCURRENT = 4
BLOCKS = 17  # the whole cache, of which vLLM keeps one: four requests of 64 tokens fit, no more
FLAGS = (
    *("--max-model-len", "240", "--max-num-seqs", str(CONCURRENT)),
    *("--num-gpu-blocks-override", str(BLOCKS), "--enable-prefix-caching"),
)
TEA = "Tea is an aromatic beverage prepared by pouring hot water over leaves of the tea plant. "


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def served(setting, model_folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log"
    own = {"XDG_CACHE_HOME": str(log.parent)}  # where a calibration is kept
    with serve(model_folder, log, SETTINGS[setting], FLAGS, **own) as server:
        yield server


@pytest.fixture(autouse=True)
def shown_log(request):
    """Where a test fails, what the server printed during it is part of the report."""
    if "served" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("served")
    before = len(server.log)
    yield
    print(server.log[before:])


def prompt_cache(setting, model):
    dense = mlx_lm.models.cache.make_prompt_cache(model)
    if setting is None:
        return dense
    settings = Settings.parse(setting)
    calibration = calibrated() if settings.calibration else None
    ours = make_prompt_cache(model, settings.config, calibration=calibration)
    return [(dense if i in settings.uncompressed else ours)[i] for i in range(len(ours))]


@cache
def calibrated():
    model, tokenizer = demo_model.load()
    text = (files("vllm_metal_tq") / "data" / "calibration.txt").read_text(encoding="utf-8")
    return calibrate(model, tokenizer.encode(text)[:CALIBRATION_TOKENS])


def expected(demo, setting, prompt, count):
    """The greedy tokens of this library: the prompt in one step, as vLLM computes it."""
    model, _ = demo
    cache = prompt_cache(setting, model)
    step, tokens = mx.array([prompt]), []
    for _ in range(count):
        step = mx.argmax(model(step, cache=cache)[:, -1:], axis=-1)
        tokens.append(step.item())
    return tokens


def tokenized(demo, text, count=None):
    return demo[1].encode(text)[:count]


def at_once(function, items):
    """``function`` of each item, all of them at the same time."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def distinct_prompts(demo, length):
    """As many prompts as requests run at once, of so many tokens, alike in no block."""
    subjects = ("Green tea", "Black coffee", "Cold water", "Hot chocolate")
    text = " is a drink that people like to have in the morning, with bread and"
    return [tokenized(demo, (subject + text) * 9, length) for subject in subjects]


def test_a_completion_has_the_tokens_of_this_library(served, demo, setting):
    prompt = tokenized(demo, TEA * 9, 150)
    assert len(prompt) == 150 <= CHUNK
    assert served.tokens(prompt, 24) == expected(demo, SETTINGS[setting], prompt, 24)


def test_a_completion_comes_whole_and_as_a_stream(served):
    ask = served.client().completions.create
    fields = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 12}
    whole = ask(**fields, temperature=0)
    parts = list(ask(**fields, temperature=0, stream=True))
    assert whole.usage.completion_tokens == 12
    assert len(parts) > 6
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert "Paris" in whole.choices[0].text


def test_a_chat_comes_whole_and_as_a_stream(served):
    ask = served.client().chat.completions.create
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    fields = {"model": MODEL, "messages": messages, "max_completion_tokens": 10, "temperature": 0}
    assert "Paris" in ask(**fields).choices[0].message.content
    # The next two read the prompt's blocks as they are kept; compressed, they may say otherwise.
    whole = ask(**fields)
    parts = list(ask(**fields, stream=True))
    streamed = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert streamed == whole.choices[0].message.content


def test_four_requests_at_once_get_what_each_gets_alone(served, demo, setting):
    prompts = distinct_prompts(demo, 40)
    together = at_once(lambda prompt: served.tokens(prompt, 12), prompts)
    assert together == [expected(demo, SETTINGS[setting], prompt, 12) for prompt in prompts]


def test_a_prompt_that_is_cached_is_not_computed_again(served, demo):
    prompt = tokenized(demo, "Once upon a time there was a teapot. " + TEA * 9, 100)
    first = served.tokens(prompt, 8)
    before = served.metric("prefix_cache_hits")
    assert served.tokens(prompt, 8) == first
    assert served.metric("prefix_cache_hits") - before == 100 // BLOCK_SIZE * BLOCK_SIZE


def test_requests_that_do_not_fit_together_are_preempted_and_end(served, demo, setting):
    before = served.metric("num_preemptions")
    prompts = distinct_prompts(demo, 40)
    together = at_once(lambda prompt: served.tokens(prompt, 28), prompts)
    assert served.metric("num_preemptions") > before
    assert together == [expected(demo, SETTINGS[setting], prompt, 28) for prompt in prompts]


def test_the_log_says_what_fits(served, setting, demo):
    found = re.findall(
        r"turboquant (\S+): (\S+)x smaller\. (\S+) tokens fit into \S+ GiB", served.log
    )
    if setting == "dense":
        assert not found
        return
    ((label, ratio, tokens),) = found
    settings = Settings.parse(SETTINGS[setting])
    args = demo[0].args
    head_dim = args.hidden_size // args.num_attention_heads
    rows = [
        PageLayout(settings.for_layer(i), head_dim).row_bytes for i in range(len(demo[0].layers))
    ]
    assert label == settings.label
    assert float(ratio) == pytest.approx(2 * 4 * head_dim * len(rows) / sum(rows), abs=0.01)
    assert int(tokens.replace(",", "")) == BLOCKS * BLOCK_SIZE


@pytest.mark.parametrize("drafts", [0, 3])
def test_vllms_own_name_of_a_cache_serves_ours(drafts, model_folder, demo, tmp_path):
    flags = ["--max-model-len", "240", "--kv-cache-dtype", "turboquant_4bit_nc"]
    if drafts:
        words = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
        lookup = {"method": "ngram", "num_speculative_tokens": drafts} | words
        flags += ["--speculative-config", json.dumps(lookup)]
    prompt = tokenized(demo, TEA * 9, 150)
    with serve(model_folder, tmp_path / "log", {"calibration": False}, flags) as server:
        assert server.tokens(prompt, 48) == expected(demo, ENDS_DENSE, prompt, 48)
        if drafts:
            accepted, drafted = (
                server.metric(f"spec_decode_num_{what}_tokens") for what in ("accepted", "draft")
            )
            assert 0 < accepted < drafted
        assert f"turboquant {Settings.parse(ENDS_DENSE).label}: " in server.log


@pytest.mark.parametrize("setting", ["dense", "tq4"])
def test_the_budget_is_divided_by_the_compressed_size(setting, model_folder, tmp_path):
    flags = ("--max-model-len", "240", "--max-num-seqs", "2")
    with serve(model_folder, tmp_path / "log", SETTINGS[setting], flags) as server:
        ((budget, block, blocks),) = re.findall(
            r"kv_budget=(\S+)GB, per_block_bytes=(\d+), num_blocks=(\d+)", server.log
        )
        planned = re.findall(r"KV cache config received: (\d+) blocks", server.log)
    layout = PageLayout(TurboQuantConfig(4, 4), 64)
    dense = 16 * 3 * 2 * 64 * 4 * 30  # float32
    assert int(block) == (dense if setting == "dense" else 30 * 3 * layout.page_bytes)
    assert int(blocks) == pytest.approx(float(budget) * 1e9 / int(block), rel=1e-2)
    assert planned == [blocks]
