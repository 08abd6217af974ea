"""A server of several processes answers as one of one process does, and none of them hangs."""

import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import openai
import pytest
import ranks
import serve_part
import serving
from part_of_model import MODELS

from vllm_metal_tq.cli import exit_status

PROMPTS = ["a tale of two cities", "a tale of one city", "the end", "once more " * 6]
BUDGET = "400KB"  # a few hundred tokens
SOON = 60  # seconds: nothing that takes longer is waited for


@contextmanager
def running(kind, count, folder, *flags):
    """Processes that serve together: an object with their ``url`` and themselves."""
    flags = ["--port", "0", "--kv-budget", BUDGET, *flags]
    flags += ["--pipeline"] * MODELS[kind][1]
    with ranks.started(count, folder, serve_part.__file__, kind, *flags) as processes:
        url = None
        end = time.monotonic() + ranks.SECONDS
        while url is None and time.monotonic() < end and all(p.poll() is None for p in processes):
            url = re.search(r"http://[^/]*", ranks.said(folder, count)[0])
            time.sleep(0.1)
        assert url, "\n".join(ranks.said(folder, count))
        yield SimpleNamespace(url=url[0], processes=processes)


def complete(client, prompt, **options):
    options = {"model": "default_model", "max_tokens": 12, "temperature": 0} | options
    return client.completions.create(prompt=prompt, **options).choices[0].text


def answers(served):
    """To all prompts at once, then to each again, which is cached by now, then one by seed."""
    client = serving.client(served)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(lambda prompt: complete(client, prompt), PROMPTS))
    found += [complete(client, prompt) for prompt in PROMPTS]
    return [*found, complete(client, PROMPTS[0], seed=1)]


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("llama", 2),
        pytest.param("pipeline", 2, marks=pytest.mark.slow),
        pytest.param("llama", 3, marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_one_process(kind, count, tmp_path):
    model = MODELS[kind][0]()
    with serving.server("--kv-budget", BUDGET, model=model) as alone:
        expected = answers(alone)
    with running(kind, count, tmp_path) as served:
        assert answers(served) == expected
        refused_and_left(served)
        assert answers(served) == expected
        sampled = {complete(serving.client(served), "dice", temperature=1.5) for _ in range(3)}
        assert len(sampled) > 1
        served.processes[0].send_signal(signal.SIGTERM)
        assert ranks.wait(served.processes, SOON) == [0] * count
    assert not any("serving" in text for text in ranks.said(tmp_path, count)[1:])


def refused_and_left(served):
    """Requests that end early: over budget, and by clients that go."""
    client = serving.client(served)
    with pytest.raises(openai.BadRequestError, match="the KV cache has room for"):
        complete(client, "too long", max_tokens=100_000)
    for options in ({}, {"seed": 1}):
        stream = client.completions.create(
            model="default_model", prompt="leave", max_tokens=40, stream=True, **options
        )
        next(iter(stream))
        stream.close()
    assert serving.wait_for(lambda: serving.health(served)["kv_blocks_reserved"] == 0, SOON)


@contextmanager
def asked(served):
    """While a client asks for more and more: what it is told at last."""
    client = serving.client(served, timeout=2 * SOON)
    told = []

    def ask():
        try:
            while True:
                complete(client, "for ever", max_tokens=200)
        except openai.APIError as error:
            told.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert serving.wait_for(lambda: serving.health(served)["kv_blocks_used"] > 0, SOON)
    yield told
    asking.join(SOON)


def test_when_one_dies_the_others_end_and_clients_are_told(tmp_path):
    with running("llama", 2, tmp_path) as served, asked(served) as told:
        served.processes[1].kill()
        if ranks.wait(served.processes, 5)[0] is None:
            served.processes[0].terminate()  # as mlx.launch does, whatever MLX has noticed
        assert ranks.wait(served.processes, SOON) == [exit_status.UNEXPECTED, -signal.SIGKILL]
    assert len(told) == 1
    assert "was closed by the peer" in ranks.said(tmp_path, 2)[0]


@pytest.mark.slow
def test_one_that_is_told_to_end_does_not_wait_for_one_that_hangs(tmp_path):
    with running("llama", 2, tmp_path) as served, asked(served) as told:
        served.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        served.processes[0].terminate()
        assert ranks.wait(served.processes[:1], SOON) == [exit_status.UNEXPECTED]
    assert len(told) == 1
    assert "another process does not answer" in ranks.said(tmp_path, 2)[0]


@pytest.mark.slow
def test_keys_end_all_of_them(tmp_path):
    with running("llama", 2, tmp_path) as served:
        for process in served.processes:  # a terminal tells all of them
            process.send_signal(signal.SIGINT)
        assert ranks.wait(served.processes, SOON) == [0, 0]
