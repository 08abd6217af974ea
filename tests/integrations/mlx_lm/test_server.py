import gc
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlx.core as mx
import models
import openai
import pytest
import serve_load
import serving
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import ModelProvider
from prometheus_client.parser import text_string_to_metric_families
from serving import client, get, health, post, server, wait_for

from vllm_metal_tq import TurboQuantConfig
from vllm_metal_tq.integrations.mlx_lm import CachePools, distributed
from vllm_metal_tq.integrations.mlx_lm.server import ServerOptions, errors, sessions
from vllm_metal_tq.integrations.mlx_lm.server.admission import Admission
from vllm_metal_tq.integrations.mlx_lm.server.prompts import PromptCache
from vllm_metal_tq.integrations.mlx_lm.server.provider import Provider
from vllm_metal_tq.pages import OutOfBlocks

BLOCK = 16
LONG = {str(serving.END): -100}  # a logit bias: the text does not end before max_tokens


@pytest.fixture(scope="module")
def model():
    return models.llama()


@pytest.fixture(scope="module")
def served(model):
    with server("--max-tokens", "20", model=model) as running:
        yield running


def text_of(served, prompt, tokens=8, **fields):
    answer = client(served).completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, logit_bias=LONG, **fields
    )
    return answer.choices[0].text


def metrics(served):
    """What ``/metrics`` says, by name; ``requests`` by outcome."""
    status, text = get(served, "/metrics")
    assert status == 200
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = {s.name.removeprefix("turboquant_"): s.value for s in samples if not s.labels}
    found["requests"] = {s.labels["outcome"]: s.value for s in samples if s.labels}
    return found


def error_of(text):
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


def raw(served, data):
    """A connection on which ``data`` has been sent."""
    connection = socket.create_connection(served.server_address, timeout=20)
    connection.sendall(data)
    return connection


def request_bytes(body, path="/v1/completions"):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def read_all(connection):
    parts = iter(lambda: connection.recv(65536), b"")
    return b"".join(parts)


# The official client


def test_openai_completions_come_whole_and_as_a_stream(served):
    ask = client(served).completions.create
    fields = {"model": "tiny", "prompt": "once upon a time", "max_tokens": 12, "logit_bias": LONG}
    whole = ask(**fields, temperature=0)
    parts = list(ask(**fields, temperature=0, stream=True))
    assert len(whole.choices[0].text) == whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens == len("once upon a time")
    assert len(parts) > 12
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.choices[0].finish_reason == parts[-1].choices[0].finish_reason == "length"


def test_openai_chat_comes_whole_and_as_a_stream(served):
    ask = client(served).chat.completions.create
    fields = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Hi!"}],
        "max_completion_tokens": 9,
        "temperature": 0,
        "logit_bias": LONG,
    }
    whole = ask(**fields)
    parts = list(ask(**fields, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert streamed == whole.choices[0].message.content
    assert len(streamed) == parts[-1].usage.completion_tokens == 9
    assert parts[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_what_a_client_gets_is_what_mlx_lm_generates(served, model):
    words = serving.tokenizer()
    prompt = "the quick brown fox jumps over the lazy dog"
    alone = models.greedy(model, CachePools(model).make_prompt_cache(), _array(words, prompt), 10)
    assert text_of(served, prompt, 10) == words.decode(alone)


@pytest.mark.parametrize("preset", ["tq3", "tq2"])
def test_trellis_codes_are_served_to_several_at_once(model, preset):
    config, words = TurboQuantConfig.from_names(preset), serving.tokenizer()
    prompts = [f"{name} " * 8 for name in ("one", "three", "seven")]
    alone = [
        words.decode(
            models.greedy(model, CachePools(model, config).make_prompt_cache(), _array(words, p), 4)
        )
        for p in prompts
    ]
    with server(model=model, preset=preset, blocks=200) as running:
        for _ in range(2):  # the second time from the prompt cache
            with ThreadPoolExecutor() as pool:
                assert list(pool.map(lambda p: text_of(running, p, 4), prompts)) == alone


def test_windows_that_wrap_are_served_to_several_at_once():
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    model = models.llama(sliding_window=40, layer_types=kinds)
    tq8, words = TurboQuantConfig.from_names("tq8"), serving.tokenizer()
    prompts = [f"{name} " * 20 for name in ("one", "three", "seven")]
    alone = [
        words.decode(
            models.greedy(model, CachePools(model, tq8).make_prompt_cache(), _array(words, p), 40)
        )
        for p in prompts
    ]
    with server(model=model, preset="tq8", blocks=200) as running:
        for _ in range(2):  # the second time from the prompt cache
            with ThreadPoolExecutor() as pool:
                answers = list(pool.map(lambda p: text_of(running, p, 40), prompts))
            assert answers == alone
        pools = running.generator.model_provider.pools
        assert [pool.max_blocks is None for pool in pools.pools] == [True, True, False]
        entries = metrics(running)["prompt_cache_sequences"]
        held = (40 + 22 + len(prompts[2]) + 15) // 16  # blocks of a window and a chunk
        assert pools.pools[0].num_used <= entries * held


def test_a_draft_model_beside_windows_is_refused(model, monkeypatch):
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    windows = models.llama(sliding_window=40, layer_types=kinds)

    def load(self, *names):
        self.model, self.draft_model, self.tokenizer = windows, model, serving.tokenizer()

    monkeypatch.setattr(ModelProvider, "_load", load)
    provider = Provider(serving.options(), lambda *_: None, lambda model, _: CachePools(model))
    with pytest.raises(ValueError, match="which TurboQuantKVCache cannot do for this model"):
        provider.load()


def _array(words, prompt):
    return mx.array(words.encode(prompt))


def test_models_lists_the_one_that_is_served(served):
    api = client(served).models
    assert [m.id for m in api.list()] == ["tiny"]
    assert api.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        api.retrieve("other")


def test_a_seeded_answer_is_the_same_twice(served):
    texts = [
        client(served)
        .completions.create(model="tiny", prompt="x", max_tokens=10, temperature=1, seed=seed)
        .choices[0]
        .text
        for seed in (5, 5, 6, -1)
    ]
    assert texts[0] == texts[1]
    if not mx.__version__.startswith("0.31."):  # there, samplers do not advance in threads
        assert texts[0] != texts[2]


# Bad requests


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "cannot be read: Expecting"),
        (b"\xff\xfe", 400, "cannot be read"),
        (b"[1]", 400, "JSON object"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"", 400, "Invalid JSON"),
        ({}, 400, "prompt must be a string"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": ["a"]}, 400, "prompt must be a string"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
        ({"prompt": "a", "temperature": float("nan")}, 400, "temperature"),
        ({"prompt": "a", "stop": [5]}, 400, "stop must"),
        ({"prompt": "a", "stop": ""}, 400, "stop must"),
        ({"prompt": "a", "stream_options": 5}, 400, "stream_options"),
        ({"prompt": "a", "logit_bias": {"97": 1}}, 400, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "gpt-4"),
        ({"prompt": "a", "adapters": "/etc"}, 400, "adapters"),
        ({"prompt": "a", "draft_model": "x"}, 400, "draft model"),
    ],
)
def test_a_bad_request_is_answered_in_openais_form(served, body, status, words):
    code, text, _ = post(served, body)
    assert (code, words in error_of(text)["message"]) == (status, True), text
    assert health(served)["status"] == "ok"


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [],
        [5],
        [{}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    ],
)
def test_bad_messages_are_refused(served, messages):
    code, text, _ = post(served, {"messages": messages}, "/v1/chat/completions")
    assert (code, error_of(text)["param"]) == (400, "messages")


def test_what_reaches_the_generation_thread_cannot_end_it(served):
    fields = {"prompt": "abc", "max_tokens": 3, "logit_bias": LONG}
    for odd in ({"top_k": 10_000}, {"max_tokens": None}, {"stop": "a"}, {"stop": None}):
        assert post(served, fields | odd)[0] == 200, odd
    assert len(text_of(served, "abc", 3)) == 3


_TOO_LARGE = [
    ("repetition_context_size", 10**12, "repetition_penalty"),
    ("presence_context_size", 10**12, "presence_penalty"),
    ("frequency_context_size", 1 << 31, "frequency_penalty"),
    *((f"{kind}_penalty", 10**300, None) for kind in ("repetition", "presence", "frequency")),
    ("presence_penalty", -1e7, None),
    *((name, 10**400, None) for name in ("temperature", "repetition_penalty")),
    *(("logit_bias", {"9": value}, None) for value in (10**300, 10**400, float("nan"))),
]


@pytest.mark.parametrize(("name", "value", "with_"), _TOO_LARGE)
def test_numbers_that_mlx_cannot_hold_are_refused(served, name, value, with_):
    """In the middle of a batch they would end everybody's requests."""
    body = {"prompt": "abc", "max_tokens": 3, name: value} | ({with_: 1.1} if with_ else {})
    code, text, _ = post(served, body)
    assert (code, error_of(text)["type"]) == (400, "invalid_request_error"), text


def test_a_client_that_has_gone_is_no_failure_of_the_server():
    error = errors.as_api_error(errors.ClientGoneError())
    assert (error.status, error.code) == (499, "client_gone")


def test_a_client_that_closes_its_side_is_answered_or_taken_for_gone(served):
    for _ in range(5):
        with raw(served, request_bytes({"prompt": "abc", "max_tokens": 3})) as connection:
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        assert not answer or int(answer.split()[1]) in (200, 499)
    assert len(text_of(served, "abc", 3)) == 3


def test_numbers_at_the_limits_are_served(served):
    sizes = dict.fromkeys(("repetition_context_size", "presence_context_size"), 1 << 30)
    penalties = {"repetition_penalty": 10**6, "presence_penalty": -(10**6)}
    fields = {"prompt": "abc", "max_tokens": 3}
    odd = (sizes | penalties, {"temperature": 10**300}, {"temperature": 1e-320}, {"min_p": 1e-320})
    for fields_too in odd:
        assert post(served, fields | fields_too)[0] == 200, fields_too


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (None, 200),
        ({"enable_thinking": False, "other": [1]}, 200),
        ("abc", 400),
        ([], 400),
        ({"chat_template": "{% for a in range(9) %}x{% endfor %}"}, 400),
        ({"tokenize": False}, 400),
        ({"padding": "max_length", "max_length": 10**6}, 400),
        ({"messages": []}, 400),
    ],
)
def test_a_client_does_not_choose_how_templates_run(served, given, code):
    messages = [{"role": "user", "content": "abc"}]
    body = {"messages": messages, "max_tokens": 2, "chat_template_kwargs": given}
    answer, text, _ = post(served, body, "/v1/chat/completions")
    assert answer == code, text
    if code == 400:
        assert error_of(text)["param"] == "chat_template_kwargs"


def test_a_failing_batch_ends_its_requests_and_not_the_server(served, monkeypatch):
    generator = served.generator
    monkeypatch.setattr(generator.admission, "reserve", _fail_once(generator.admission.reserve))
    code, text, _ = post(served, {"prompt": "abc", "max_tokens": 3})
    assert (code, error_of(text)["code"]) == (500, "internal_error")
    assert "planted" in text

    made = type(generator.model_provider.model)
    monkeypatch.setattr(made, "__call__", _fail_once(made.__call__, after=4))
    asked = [
        threading.Thread(target=lambda p=p: codes.append(post(served, p)[0]))
        for p in ({"prompt": "abc", "max_tokens": 60}, {"prompt": "xyz", "max_tokens": 60})
    ]
    codes = []
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join(20)
    assert len(codes) == 2
    assert 500 in codes
    assert len(text_of(served, "abc", 3)) == 3
    assert health(served)["kv_blocks_reserved"] == 0


def _fail_once(function, after=0):
    calls = []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == after + 1:
            raise RuntimeError("planted")
        return function(*args, **options)

    return failing


def test_unknown_paths_and_methods_are_errors_in_openais_form(served):
    assert (get(served, "/v2")[0], error_of(get(served, "/v2")[1])["type"]) == (
        404,
        "not_found_error",
    )
    code, text, _ = post(served, {}, "/v1/embeddings")
    assert (code, bool(error_of(text))) == (404, True)
    with raw(served, b"DELETE /v1/models HTTP/1.1\r\n\r\n") as connection:
        head, body = read_all(connection).split(b"\r\n\r\n", 1)
    assert b" 501 " in head
    assert error_of(body)


# Limits for clients


def test_a_large_body_is_refused_before_it_is_read(model):
    with server(model=model, limits=ServerOptions(max_body_bytes=1000)) as running:
        code, text, _ = post(running, {"prompt": "x" * 2_000_000})
        assert (code, error_of(text)["code"]) == (413, "request_too_large")
        assert post(running, {"prompt": "x" * 900, "max_tokens": 1})[0] == 200
        with raw(running, b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n") as c:
            assert b" 400 " in read_all(c).split(b"\r\n")[0]
        with raw(running, b"POST /v1/completions HTTP/1.1\r\n\r\n") as c:
            head, body = read_all(c).split(b"\r\n\r\n", 1)
        assert b" 411 " in head
        assert "Content-Length" in error_of(body)["message"]


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/completions HTTP/1.1\r\nContent-", b""),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{", b" 408 "),
    ],
)
def test_a_client_that_stalls_is_timed_out_even_if_it_drips(model, sent, answer):
    with server(model=model, limits=ServerOptions(client_timeout=0.6)) as running:
        started = time.monotonic()
        with raw(running, sent) as connection:
            connection.settimeout(0.1)
            got, closed = b"", False
            while not closed and time.monotonic() < started + 8:
                try:
                    part = connection.recv(65536)
                    got, closed = got + part, not part
                except TimeoutError:
                    if sent:
                        connection.sendall(b"x")  # never silent for as long as the limit
        took = time.monotonic() - started
        assert closed
        assert 0.5 < took < 6
        assert answer in got.split(b"\r\n")[0]
        assert len(text_of(running, "abc", 3)) == 3


# The budget


def test_over_budget_is_answered_while_others_go_on(model, slowly):
    with server(model=model, blocks=20) as running:
        first = client(running).completions.create(
            model="tiny", prompt="a" * 40, max_tokens=200, logit_bias=LONG, stream=True
        )
        parts = [next(iter(first))]  # 15 blocks and 2 copies are promised
        with pytest.raises(openai.InternalServerError) as now:
            text_of(running, "b" * 40, 40)
        assert now.value.status_code == 503
        assert now.value.code == "kv_cache_full"
        assert int(now.value.response.headers["Retry-After"]) > 0
        with pytest.raises(openai.BadRequestError) as never:
            text_of(running, "b" * 40, 400)
        assert never.value.code == "context_length_exceeded"
        parts += list(first)
        assert len("".join(part.choices[0].text for part in parts)) == 200
        assert len(text_of(running, "b" * 40, 40)) == 40  # at the cost of what was kept
        outcomes = metrics(running)["requests"]
        assert (outcomes["refused"], outcomes["finished"], outcomes["failed"]) == (2, 2, 0)


def test_a_length_that_the_client_leaves_open_is_clipped_to_the_budget(model):
    with server("--max-tokens", "500", model=model, blocks=10) as running:
        answer = client(running).completions.create(
            model="tiny", prompt="a" * 40, temperature=0, logit_bias=LONG
        )
        assert answer.usage.completion_tokens == (10 - 2) * BLOCK - 40
        with pytest.raises(openai.BadRequestError, match="room for 128"):
            client(running).completions.create(model="tiny", prompt="a" * 200)


def test_a_full_budget_never_runs_out_in_a_batch(model):
    """Requests that just fit, with shared prefixes and segments, joining at any time."""
    with server("--prompt-cache-size", "50", model=model, blocks=24) as running:
        codes = []

        def ask(i):
            for j in range(4):
                messages = [
                    {"role": "system", "content": "s" * (5 + i)},
                    {"role": "user", "content": "q" * (7 * j + i) + str(i)},
                ]
                body = {"messages": messages, "max_tokens": 20 + 3 * i, "logit_bias": LONG}
                codes.append(post(running, body, "/v1/chat/completions")[0])

        threads = [threading.Thread(target=ask, args=[i]) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(codes) == 24
        assert set(codes) <= {200, 503}
        assert codes.count(200) >= 6
        state = health(running)
        assert state["kv_blocks_used"] <= state["kv_blocks_total"] == 24
        assert metrics(running)["requests"]["failed"] == 0


class _Pools:
    """Blocks as sequences take them, with nothing behind them."""

    block_size = 16

    def __init__(self, max_blocks, used=0):
        self.max_blocks = max_blocks
        self.used_blocks = used


def test_admission_counts_what_runs_what_is_used_and_what_is_shared():
    pools = _Pools(10)
    admission = Admission(pools, lambda: False)
    first = admission.reserve(tokens=5 * 16, cached=0, copies=1)  # 6 blocks promised
    assert admission.outstanding == 6
    pools.used_blocks, first.tokens = 2, 17  # two of them taken
    assert admission.outstanding == 4
    with pytest.raises(errors.APIError) as full:
        admission.reserve(tokens=4 * 16, cached=0, copies=1)  # 2 + 4 + 5 > 10
    assert (full.value.status, full.value.retry_after) == (503, 5)
    second = admission.reserve(tokens=4 * 16, cached=16, copies=1)  # one is held already
    assert admission.outstanding == 4 + 4
    with pytest.raises(errors.APIError) as never:
        admission.reserve(tokens=10 * 16, cached=0, copies=1)
    assert (never.value.status, never.value.code) == (400, "context_length_exceeded")
    admission.release(first)
    admission.release(first)
    assert admission.outstanding == 4
    admission.release(second)
    pools.used_blocks = 9
    evicted = []

    def evict():
        evicted.append(1)
        pools.used_blocks -= 3
        return True

    Admission(pools, evict).reserve(tokens=5 * 16, cached=0, copies=1)
    assert len(evicted) == 2  # no more than it took


def test_admission_evicts_nothing_for_who_cannot_join_anyway():
    pools, evicted = _Pools(20), []

    def evict():
        evicted.append(1)
        pools.used_blocks -= 3
        return pools.used_blocks > 0

    admission = Admission(pools, evict)
    running = admission.reserve(tokens=10 * 16, cached=0, copies=1)  # 11 blocks
    pools.used_blocks, running.tokens = 2 + 9, 2 * 16  # two are its own, nine are cached
    with pytest.raises(errors.APIError) as full:
        admission.reserve(tokens=9 * 16, cached=0, copies=1)  # 11 + 10 > 20
    assert full.value.status == 503
    assert not evicted
    assert admission.outstanding == 9  # nothing is left of the one refused
    admission.reserve(tokens=9 * 16, cached=16, copies=0)  # 11 + 8, for which the cache gives way
    assert len(evicted) == 3


# The prompt cache


def _speculated(model, draft, pools, prompt, count):
    """What mlx_lm's server has when it has answered with a draft model: a key and its caches."""
    caches = pools.make_prompt_cache() + make_prompt_cache(draft)
    steps = speculative_generate_step(
        prompt, model, draft, num_draft_tokens=3, max_tokens=count, prompt_cache=caches
    )
    return prompt.tolist() + [token for token, _, _ in steps], caches


@pytest.mark.parametrize("count", range(3, 9))
def test_a_turn_after_speculation_skips_no_token(model, count):
    draft, pools = (
        models.llama(num_hidden_layers=1),
        CachePools(model, TurboQuantConfig.from_names("tq8")),
    )
    key, caches = _speculated(model, draft, pools, models.tokens(40)[0], count)
    kept = PromptCache(10, None, lambda: 0)
    kept.insert_cache("m", key, caches)
    assert caches == []
    turn = [*key, 7, 8, 9]
    warm, rest = kept.fetch_nearest_cache("m", turn)
    assert len(turn) - len(rest) >= 40
    assert {cache.offset for cache in warm} == {len(turn) - len(rest)}
    for part, reader in ((warm[:3], model), (warm[3:], draft)):
        cold = pools.make_prompt_cache() if reader is model else make_prompt_cache(draft)
        expected = reader(mx.array([turn]), cache=cold)[0, -1]
        found = reader(mx.array([rest]), cache=part)[0, -1]
        assert mx.abs(found - expected).max() < 0.02 * mx.abs(expected).max()


def test_stages_agree_on_a_prompt_that_one_of_them_cannot_trim(model, monkeypatch):
    """Each stage is a thread here, with an entry for the very prompt."""
    barrier, named = threading.Barrier(2, timeout=10), {}

    def most(number):
        named[threading.get_ident()] = number
        barrier.wait()
        found = max(named.values())
        barrier.wait()
        return found

    monkeypatch.setattr(distributed, "most", most)
    tokens = list(range(8))

    def fetched(cache):
        kept = PromptCache(10, None, lambda: 0)
        kept.insert_cache("m", tokens, [cache])
        return kept.fetch_nearest_cache("m", tokens)

    trimmable = CachePools(model).make_prompt_cache()[0]
    trimmable.update_and_fetch(*[mx.zeros((1, trimmable.pool.num_kv_heads, 8, 64))] * 2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(fetched, [trimmable, _Untrimmable(8)]))
    assert found == [(None, tokens)] * 2


def test_caches_that_disagree_and_cannot_be_trimmed_are_not_kept(model):
    kept = PromptCache(10, None, lambda: 0)
    for lengths, found in (((8, 8), 8), ((9, 8), 0), ((7, 7), 7)):
        caches = [_Untrimmable(length) for length in lengths]
        kept.insert_cache(str(lengths), list(range(8)), caches)
        rest = kept.fetch_nearest_cache(str(lengths), list(range(10)))[1]
        assert 10 - len(rest) == found


class _Untrimmable:
    nbytes = 0

    def __init__(self, offset):
        self.offset = offset

    def is_trimmable(self):
        return False


def test_a_prefix_is_served_from_pages_and_counted(model):
    prefix = "it was the best of times, it was the worst of times"
    with server(model=model) as running, server() as cold:
        text_of(running, prefix, 8)
        before = health(running)["kv_blocks_used"]
        warm = client(running).completions.create(
            model="tiny", prompt=prefix + " and", max_tokens=8, temperature=0, logit_bias=LONG
        )
        cached = warm.usage.prompt_tokens_details.cached_tokens
        assert cached == len(prefix)
        assert warm.choices[0].text == text_of(cold, prefix + " and", 8)
        # One more sequence of 63 tokens; what it shares are full blocks.
        assert health(running)["kv_blocks_used"] - before == 4 - len(prefix) // BLOCK
        counts = metrics(running)
        assert counts["prompt_tokens_cached_total"] == cached
        assert counts["prompt_tokens_total"] == 2 * len(prefix) + 4
        assert counts["prefix_hit_ratio"] == pytest.approx(cached / (2 * len(prefix) + 4))


def test_a_prompt_that_is_cached_in_full_is_answered(served):
    text = text_of(served, "again", 1)
    assert len(text_of(served, "again" + text, 3)) == 3  # mlx_lm's thread would end here
    assert text_of(served, "again", 1) == text


def test_prompt_cache_bytes_bound_what_is_kept(model):
    block_bytes = CachePools(model).block_bytes
    with server("--prompt-cache-bytes", str(8 * block_bytes), model=model) as running:
        for letter in "abcdef":
            text_of(running, letter * 40, 8)
        text_of(running, "z", 1)  # mlx_lm looks when a request joins
        state = health(running)
        assert 0 < state["prompt_cache_sequences"] < 6
        assert state["kv_bytes_used"] <= 8 * block_bytes + block_bytes


# Metrics


def test_metrics_add_up(model):
    with server(model=model, blocks=30) as running:
        started = time.monotonic()
        for n in (3, 5):
            text_of(running, "hello " * n, n)
        post(running, {"prompt": 5})
        counts = metrics(running)
        for kind in ("blocks", "bytes"):
            used, free, total = (counts[f"kv_{kind}_{n}"] for n in ("used", "free", "total"))
            assert used + free == total
            assert used > 0
        block_bytes = running.generator.model_provider.pools.block_bytes
        assert counts["kv_bytes_used"] == counts["kv_blocks_used"] * block_bytes
        assert counts["kv_blocks_total"] == 30
        assert counts["kv_blocks_reserved"] == counts["requests_running"] == 0
        assert counts["generated_tokens_total"] == 3 + 5
        assert counts["prompt_tokens_total"] == 6 * (3 + 5)
        assert counts["requests"]["finished"] == counts["request_seconds_count"] == 2
        assert counts["tokens_per_second"] == pytest.approx(8 / 10)
        assert 0 < counts["first_token_seconds_sum"] <= counts["request_seconds_sum"]
        assert counts["request_seconds_sum"] < time.monotonic() - started
        state = health(running)
        assert state["kv_blocks_used"] == counts["kv_blocks_used"]


def test_metrics_say_what_they_need(served, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, text = get(served, "/metrics")
    assert (code, "vllm-metal-tq[serve]" in error_of(text)["message"]) == (501, True)


# Clients that leave


def blocks_in_use(running):
    """Blocks that are used when nothing is cached, and that are promised."""
    while running.generator.prompt_cache.evict():
        pass
    state = health(running)
    return state["kv_blocks_used"], state["kv_blocks_reserved"]


def ends_free(running, cancelled=1):
    """Whether all comes free soon, with so many requests counted as cancelled."""
    return wait_for(
        lambda: (
            metrics(running)["requests_running"] == 0
            and blocks_in_use(running) == (0, 0)
            and metrics(running)["requests"]["cancelled"] == cancelled
        )
    )


@pytest.fixture
def uncollected():
    """Blocks must come free by themselves, not when the garbage collector finds a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def slowly(monkeypatch):
    """Every step of the model takes a while longer."""
    made = type(models.llama())
    step = made.__call__

    def slow(*args, **options):
        time.sleep(0.03)
        return step(*args, **options)

    monkeypatch.setattr(made, "__call__", slow)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_request_frees_its_blocks(model, slowly, uncollected, stream, seed):
    with server(model=model) as running:
        body = {"prompt": "a" * 40, "max_tokens": 3000, "logit_bias": LONG, "stream": stream}
        with raw(running, request_bytes(body | {"seed": seed})):
            assert wait_for(lambda: health(running)["kv_blocks_used"] > 2)
            # Another one is not disturbed.
            if seed is None:
                assert len(text_of(running, "b" * 20, 5)) == 5
        started = time.monotonic()
        assert ends_free(running)
        assert time.monotonic() - started < 5
        assert metrics(running)["generated_tokens_total"] < 500


@pytest.mark.parametrize("seed", [None, 7])
def test_a_request_is_cancelled_in_the_middle_of_its_prompt(model, slowly, uncollected, seed):
    with server("--prefill-step-size", "16", model=model) as running:
        body = {"prompt": "a" * 3000, "max_tokens": 5, "seed": seed}
        with raw(running, request_bytes(body)):
            assert wait_for(lambda: health(running)["kv_blocks_used"] > 2)
        assert ends_free(running)
        assert metrics(running)["prompt_tokens_total"] == 0  # it never came to its first token


def test_a_request_is_cancelled_while_it_waits(model, slowly):
    with server("--decode-concurrency", "1", "--prompt-concurrency", "1", model=model) as running:
        body = {"prompt": "a" * 40, "max_tokens": 100, "logit_bias": LONG}
        with raw(running, request_bytes(body)) as first:
            assert wait_for(lambda: health(running)["kv_blocks_used"] > 2)
            with raw(running, request_bytes(body | {"seed": 3})):  # has to wait for the batch
                time.sleep(0.3)
            assert b" 200 " in read_all(first).split(b"\r\n")[0]
        assert ends_free(running)
        assert metrics(running)["generated_tokens_total"] == 100


def test_a_client_that_takes_no_answer_is_cancelled(model):
    limits = ServerOptions(client_timeout=0.6)
    with server(model=model, limits=limits) as running:
        running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # clients inherit it
        body = {"prompt": "a", "max_tokens": 100_000, "logit_bias": LONG, "stream": True}
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(running.server_address)
        with connection:
            connection.sendall(request_bytes(body))
            assert wait_for(lambda: metrics(running)["requests"]["cancelled"] == 1, 30)
        assert ends_free(running)


@pytest.mark.parametrize("seed", [None, 7])
def test_stopping_tells_those_who_wait(model, slowly, seed):
    with server(model=model) as running:
        body = {"prompt": "a", "max_tokens": 3000, "logit_bias": LONG, "seed": seed}
        with raw(running, request_bytes(body)) as connection:
            assert wait_for(lambda: health(running)["kv_blocks_used"] > 0)
            running.generator.stop_and_join()
            head, text = read_all(connection).split(b"\r\n\r\n", 1)
        assert b" 503 " in head.split(b"\r\n")[0]
        assert error_of(text)["code"] == "unavailable"
        assert health(running)["status"] == "unavailable"
        assert post(running, body)[0] == 503


def test_many_clients_who_come_and_go_leave_nothing_and_get_their_own(model):
    # Eight bits, so that an answer from cached pages is near to one from none.
    with server(model=model, blocks=400, preset="tq8") as running:
        load = serve_load.Load(running.url, "tiny", serve_load.TINY_PROMPTS, chat=False)
        before = load.blocks_when_empty()
        report = load.run(clients=12, seconds=6, leave=0.4)
        assert report.wrong == []
        assert report.drift < 0.02 < report.apart / 4  # so that another's would be noticed
        assert min(report.outcomes["answered"], report.outcomes["left"]) > 3
        assert load.blocks_when_empty() == before == 0


def test_watch_sees_that_the_other_end_has_closed():
    ours, theirs = socket.socketpair()
    session = sessions.Session(ours, explicit=True)
    watch = sessions.Watch()
    with ours, watch.over(session):
        theirs.sendall(b"more")  # is not the end
        assert not wait_for(lambda: session.gone, 3 * sessions.POLL_SECONDS)
        ours.recv(4)
        theirs.close()
        assert wait_for(lambda: session.gone)
    watch.stop()


def test_mlx_lms_own_server_keeps_its_own_batches():
    import mlx_lm.server as host
    from mlx_lm.generate import BatchGenerator

    from vllm_metal_tq.integrations.mlx_lm.server import batch

    batch.install()
    assert type(host.BatchGenerator(models.llama())) is BatchGenerator


def test_requests_share_what_is_sampled_in_a_batch_and_alone(model, monkeypatch):
    """Both ask mlx_lm's server for a sampler; equal ones are one, by which it samples at once."""
    shared = []

    def same(sampler):
        shared.append(sampler)
        return sampler

    monkeypatch.setattr(distributed, "same", same)
    with server(model=model) as running:
        for options in ({}, {"seed": 1}):
            before = len(shared)
            complete = client(running).completions.create
            complete(model="tiny", prompt="a", max_tokens=2, temperature=0, **options)
            assert len(shared) == before + 1, options
    assert shared[0] is shared[1]


def test_error_texts_name_no_path_and_no_secret(served):
    text = post(served, {"prompt": "a", "stop": [5]})[1]
    assert not re.search(r"File|Traceback|site-packages", text)


@pytest.mark.slow
def test_a_draft_model_and_a_model_in_a_folder(tmp_path):
    serve_load.tiny_model(tmp_path)
    folder = str(tmp_path)
    flags = ("--preset", "tq8", "--no-calibrate", "--kv-budget", "1MB")
    fields = {"model": folder, "prompt": "a" * 50, "max_tokens": 40, "temperature": 0}
    texts = []
    for draft in ((), ("--draft-model", folder)):
        with serve_load.server(folder, *flags, *draft) as url:
            api = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
            texts += [api.completions.create(**fields).choices[0].text for _ in range(2)]
            with pytest.raises(openai.BadRequestError, match="room for"):
                api.completions.create(**fields | {"max_tokens": 10**6})
    assert texts == [texts[0]] * 4
    assert texts[0]


# Memory that runs out although admission promised it: the machine's own


NO_MEMORY = {
    "pool": partial(OutOfBlocks, "full"),
    "MLX": partial(RuntimeError, "[malloc] Unable to allocate"),
    "Python": MemoryError,
}


def runs_out(monkeypatch, whose, after):
    """The model fails once so many steps have been taken."""
    made = type(models.llama())
    step, calls = made.__call__, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == after + 1:
            raise NO_MEMORY[whose]()  # a new one: whoever keeps an error keeps what it refers to
        return step(*args, **options)

    monkeypatch.setattr(made, "__call__", failing)


@pytest.mark.parametrize("whose", NO_MEMORY)
@pytest.mark.parametrize("after", [2, 8], ids=["prefill", "decode"])
@pytest.mark.parametrize("stream", [True, False])
def test_memory_that_runs_out_ends_the_request_and_not_the_server(
    model, monkeypatch, whose, after, stream
):
    with server("--prefill-step-size", "16", model=model) as running:
        runs_out(monkeypatch, whose, after)
        body = {"prompt": "a" * 60, "max_tokens": 30, "logit_bias": LONG, "stream": stream}
        status, text, _ = post(running, body)
        if stream and status == 200:  # it had begun: the client is told in the stream
            events = [line for line in text.split("\n") if line.startswith("data: {")]
            assert error_of(events[-1].removeprefix("data: "))["code"] == "internal_error"
            assert "[DONE]" not in text
        else:
            assert (status, error_of(text)["code"]) == (500, "internal_error")
        assert ends_free(running, cancelled=0)
        assert metrics(running)["requests"]["failed"] == 1
        assert len(text_of(running, "abc", 3)) == 3


def test_many_who_ask_for_too_much_at_once_are_all_refused_and_nobody_is_disturbed(model, slowly):
    with server(model=model, blocks=20) as running:
        first = client(running).completions.create(
            model="tiny", prompt="a" * 40, max_tokens=200, logit_bias=LONG, stream=True
        )
        parts, codes = [next(iter(first))], []

        def ask(i):
            body = {"prompt": "b" * (30 + i), "max_tokens": 60, "stream": bool(i % 2)}
            codes.append(post(running, body)[0])

        threads = [threading.Thread(target=ask, args=[i]) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [503] * 12
        parts += list(first)
        assert len("".join(part.choices[0].text for part in parts)) == 200
        assert (
            metrics(running)["requests"] | {"refused": 12, "failed": 0}
            == (metrics(running)["requests"])
        )


def test_a_client_that_reads_slowly_holds_up_nobody_else(model):
    """Its answer waits in memory: the generation goes on, and so do the others'."""
    with server(model=model) as running:
        running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = {"prompt": "a", "max_tokens": 400, "logit_bias": LONG, "stream": True}
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(running.server_address)
        with slow:
            slow.sendall(request_bytes(body))
            assert slow.recv(1)  # and no more for now
            assert len(text_of(running, "b" * 20, 30)) == 30
            assert wait_for(lambda: metrics(running)["kv_blocks_reserved"] == 0, 30)
            rest = read_all(slow)
        assert rest.count(b"data: {") >= 400
        assert b"[DONE]" in rest
        assert metrics(running)["requests"]["finished"] == 2
