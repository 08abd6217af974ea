import json
from types import SimpleNamespace

import pytest
import serve_load

from vllm_metal_tq.bench import process
from vllm_metal_tq.bench import serve as load
from vllm_metal_tq.cli import bench_model, bench_serve, common, main

HEAD = {"device", "system", "mlx", "mlx_lm", "vllm_metal_tq", "runs"}
OWN = {"preset", "k_quant", "v_quant", "model", "clients", "max_tokens", "servers"}
SERVER = {
    *("cache", "requests", "prompt_tokens", "tokens", "tokens_per_s", "first_token_s"),
    *("first_token_p95_s", "latency_s", "latency_p95_s", "skipped"),
}
CACHES = ["dense float32", "mlx_lm 8-bit", "mlx_lm 4-bit", "tq8"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    serve_load.tiny_model(folder)
    return str(folder)


def bench(capsys, *flags):
    status = main(["bench", "serve", *flags])
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_all_servers_answer_the_same_load(capsys, tiny):
    flags = ("--clients", "3", "--requests", "5", "--prompt-words", "10", "--max-tokens", "6")
    flags = ("--model", tiny, "--preset", "tq8", "--no-calibrate", *flags)
    status, out, _ = bench(capsys, *flags, "--json")
    assert status == 0
    answer = json.loads(out)
    assert set(answer) == HEAD | OWN
    assert [server["cache"] for server in answer["servers"]] == CACHES
    for server in answer["servers"]:
        assert set(server) == SERVER
        if server["skipped"] is None:
            assert server["requests"] == 5
            assert server["tokens"] <= 5 * 6
            assert 0 < server["first_token_s"] <= server["latency_s"] <= server["latency_p95_s"]
    dense, *_, ours = answer["servers"]
    assert (dense["skipped"], ours["skipped"]) == (None, None)
    assert dense["prompt_tokens"] == ours["prompt_tokens"]


@pytest.fixture
def servers(monkeypatch):
    """No servers: what would be asked of them."""
    facts = bench_model.Facts(1, 4096, "bfloat16", {"device": "M1", "mlx": "1", "mlx_lm": "2"})
    facts.machine["runs"] = "kernels"
    monkeypatch.setattr(bench_model, "facts", lambda args: facts)
    asked = []

    def measure(args, cache, prompts):
        asked.append((cache, prompts))
        figures = dict.fromkeys(bench_serve.FIGURES, 1.5)
        return {**figures, "tokens": 9, "skipped": "no room" if cache == "mlx_lm 4-bit" else None}

    monkeypatch.setattr(bench_serve, "_measure", measure)
    return asked


def test_servers_get_the_same_prompts_one_for_each_request_and_warm_up(capsys, servers):
    flags = ("--clients", "3", "--requests", "5", "--prompt-words", "10")
    assert bench(capsys, "--model", "m", *flags)[0] == 0
    assert [cache for cache, _ in servers] == ["bf16", "mlx_lm 8-bit", "mlx_lm 4-bit", "tq4"]
    (prompts,) = {tuple(prompts) for _, prompts in servers}
    assert len(set(prompts)) == 8
    assert {len(prompt.split()) for prompt in prompts} == {10}


def test_the_table_names_the_machine_and_what_was_skipped(capsys, servers):
    out = bench(capsys, "--model", "m")[1]
    for word in ("M1", "kernels", "first token s", "tq4", "skipped: no room"):
        assert word in out


def test_a_server_that_ends_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(bench_serve, "_serve_ours", print)  # and no more
    found = bench_serve._measure(None, "tq4", [])
    assert found["skipped"] == "the server did not start: the process ended with status 0"
    assert found["tokens_per_s"] is None


def test_a_request_that_fails_is_a_reason_too(monkeypatch):
    def refuse(*_):
        raise ValueError("status 503: full")

    monkeypatch.setattr(bench_serve, "_wait_for", lambda address, running: None)
    monkeypatch.setattr(load, "load", refuse)
    monkeypatch.setattr(bench_serve, "_serve_ours", print)
    args = SimpleNamespace(clients=1, max_tokens=1)
    assert bench_serve._measure(args, "tq4", [])["skipped"] == "status 503: full"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "tq5"], "preset 'tq5' is unknown"),
        (["--clients", "0"], "--clients 0 must be at least 1"),
        (["--requests", "0"], "--requests 0 must be at least 1"),
        (["--prompt-words", "-1"], "--prompt-words -1 must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--prompt-words", "9999999"], "the text has "),
    ],
)
def test_bad_input_is_one_clear_error_before_a_model_is_loaded(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(process, "apart", lambda work, *args: work(*args))
    monkeypatch.setattr(common, "load_model", lambda name: pytest.fail("was loaded"))
    status, out, err = bench(capsys, "--model", "demo", *flags)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
