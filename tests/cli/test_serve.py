import argparse
import os
import signal
import socket
import threading
import urllib.request

import mlx.core as mx
import mlx_lm.server
import openai
import pytest

from vllm_metal_tq import demo_model
from vllm_metal_tq.cli import main, serve

SAFER = {"allowed_origins"}  # has another default: test_security.py
OURS = {"kv_bits", "kv_group_size", "quantized_kv_start"}  # fixed, not flags


def flags_of(parser):
    return {a.dest: a for a in parser._actions if a.option_strings and a.dest != "help"}


@pytest.fixture
def parser():
    made = argparse.ArgumentParser()
    serve.add_arguments(made)
    return made


def test_flags_and_defaults_are_those_of_mlx_lms_server(parser, monkeypatch):
    class FoundError(Exception):
        pass

    def found(self, *args):
        raise FoundError(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", found)
        with pytest.raises(FoundError) as theirs:
            mlx_lm.server.main()
    theirs = flags_of(theirs.value.args[0])
    ours = flags_of(parser)
    assert set(theirs) - set(ours) <= OURS
    args = parser.parse_args(["--model", "m"])
    for name, action in theirs.items():
        if name in ours and name != "model":
            assert ours[name].option_strings == action.option_strings
            default = action.default
            if isinstance(default, str) and action.type is not None:
                default = action.type(default)
            if name not in SAFER:
                assert getattr(args, name) == default, name
    assert all(hasattr(args, name) for name in theirs)  # what mlx_lm's code may read


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("512M", 512 * 10**6), ("1.5g", 15 * 10**8), ("64kb", 64_000), ("7", 7)],
)
def test_sizes_are_read(text, count):
    assert serve.size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2TB", "2 apples", "nan", "1e999"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"is no size|could not convert"):
        serve.size(text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "tq5"], "tq5"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--prefill-step-size", "0"], "--prefill-step-size 0"),
        (["--decode-concurrency", "-1"], "--decode-concurrency -1"),
        (["--client-timeout", "0"], "--client-timeout 0"),
        (["--chat-template-args", "[]"], "JSON object"),
        (["--kv-budget", "100", "--no-calibrate"], "one block"),
        (["--calibration", "none.safetensors"], "none.safetensors"),
        (["--model", "/nowhere", "--no-calibrate"], "/nowhere"),
    ],
)
def test_what_cannot_be_served_is_one_clear_error(capsys, flags, words):
    before = threading.active_count()
    assert main(["serve", "--model", "demo", "--port", "0", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert threading.active_count() == before


def test_a_port_that_is_taken_is_an_error(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", "demo", "--port", port, "--no-calibrate"]) == 2
    assert "in use" in capsys.readouterr().err


def test_the_default_budget_is_a_share_of_what_metal_recommends(monkeypatch):
    monkeypatch.setattr(mx, "get_active_memory", lambda: 3 * 10**9)
    for info, budget in (
        ({}, None),
        ({"max_recommended_working_set_size": 13 * 10**9}, 8 * 10**9),
    ):
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        assert serve.default_budget() == budget
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10**9})
    with pytest.raises(ValueError, match="--kv-budget"):
        serve.default_budget()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_client_is_answered_until_a_signal_comes(capsys, demo, sign):
    """The command in this thread; the client, and then the signal, from another."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    got = {}

    def ask():
        try:
            wait_until_there(port)
            api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=120)
            fields = {"model": "demo", "temperature": 0, "max_tokens": 6}
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            whole = api.chat.completions.create(messages=messages, **fields)
            parts = list(api.chat.completions.create(messages=messages, stream=True, **fields))
            got["chat"] = whole.choices[0].message.content
            got["stream"] = "".join(p.choices[0].delta.content or "" for p in parts)
            got["cached"] = whole.usage.prompt_tokens
            text = api.completions.create(prompt="The capital of France is", **fields)
            got["text"] = text.choices[0].text
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                got["metrics"] = answer.read().decode()
        finally:
            os.kill(os.getpid(), sign)

    thread = threading.Thread(target=ask)
    thread.start()
    status = main(["serve", "--model", "demo", "--port", str(port), "--kv-budget", "50MB"])
    thread.join()
    assert status == 0
    assert f"serving demo on http://127.0.0.1:{port}/v1" in capsys.readouterr().out
    assert got["chat"]
    assert got["stream"]
    assert "Paris" in got["chat"] + got["text"]
    assert 'turboquant_requests_total{outcome="finished"} 3.0' in got["metrics"]
    # The second chat found all but the last token of its prompt in pages.
    assert f"tokens_cached_total {got['cached'] - 1}.0" in got["metrics"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "make_cache" not in vars(demo[0])  # its caches are mlx_lm's own again


def wait_until_there(port, tries=600):
    for _ in range(tries):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            threading.Event().wait(0.2)
    raise TimeoutError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "65536"], "--port 65536 must be from 0 to 65535"),
        (["--port", "-1"], "--port -1 must be from 0 to 65535"),
        (["--client-timeout", "inf"], "--client-timeout inf must be above 0, and 86400 at most"),
        (["--client-timeout", "nan"], "--client-timeout nan must be above 0"),
        (["--max-tokens", "9" * 30], "9 must be at most 2147483647"),
        (["--prompt-cache-size", "-1"], "--prompt-cache-size -1 must be at least 0"),
        (["--num-draft-tokens", "-1"], "--num-draft-tokens -1 must be at least 0"),
        (["--temp", "inf"], "--temp inf must be a number of at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_a_model_is_loaded(
    capsys, monkeypatch, flags, message
):
    monkeypatch.setattr(demo_model, "load", lambda *_: pytest.fail("it was loaded"))
    assert main(["serve", "--model", "demo", *flags]) == 2
    assert message in capsys.readouterr().err


def test_json_that_is_nested_too_deeply_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model", "demo", "--chat-template-args", "[" * 100_000])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --chat-template-args: ")
