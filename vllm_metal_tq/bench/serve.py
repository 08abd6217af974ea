"""Clients of a server that speaks OpenAI's API: how long they wait, and what they get."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

TIMEOUT = 600.0  # seconds for a server to start, and to send each piece of an answer


@dataclass(frozen=True)
class Answer:
    """One request, as its client saw it.

    Attributes:
        first_s: seconds from the request to the first text.
        seconds: to the end of the answer.
        prompt_tokens: as the server counts them.
        tokens: generated, likewise.
    """

    first_s: float
    seconds: float
    prompt_tokens: int
    tokens: int


def excerpts(text: str, words: int, count: int) -> list[str]:
    """``count`` parts of ``text``, so many words each, whose beginnings differ.

    Raises:
        ValueError: the text is too short for so many.
    """
    every = text.split()
    places = len(every) - words + 1
    if places < count:
        raise ValueError(f"the text has {len(every)} words: too few for {count} parts of {words}")
    starts = [i * places // count for i in range(count)]
    return [" ".join(every[start : start + words]) for start in starts]


def ask(address: tuple[str, int], model: str, prompt: str, max_tokens: int) -> Answer:
    """Have a prompt continued, as a stream.

    Raises:
        ValueError: the server refuses, or ends the stream without a count of tokens.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    try:
        start, first, usage = time.perf_counter(), None, None
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read(500).decode()}")
        for event in _events(response):
            if first is None and any(choice.get("text") for choice in event.get("choices", ())):
                first = time.perf_counter() - start
            usage = event.get("usage") or usage
        seconds = time.perf_counter() - start
    finally:
        connection.close()
    if usage is None:
        raise ValueError("the stream ended without a count of tokens")
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return Answer(seconds if first is None else first, seconds, *counts)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream; lines that keep a connection alive are left out."""
    for line in response:
        data = line.strip().removeprefix(b"data: ")
        if line.startswith(b"data: ") and data != b"[DONE]":
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"the stream failed: {event['error']}")
            yield event


def load(
    address: tuple[str, int], model: str, prompts: Sequence[str], clients: int, max_tokens: int
) -> dict[str, float]:
    """Let clients ask, each its next prompt as soon as it is answered.

    Args:
        address: host and port of the server.
        model: the name that it serves.
        prompts: texts; the first, one for each client, are the warm-up, and not counted.
        clients: that ask at a time.
        max_tokens: of an answer.

    Returns:
        ``requests`` and ``tokens`` generated; ``prompt_tokens`` of the median request;
        ``tokens_per_s`` of all clients together; ``first_token_s`` and ``latency_s``, medians,
        and ``first_token_p95_s`` and ``latency_p95_s``.
    """
    with ThreadPoolExecutor(clients) as pool:

        def answers(some: Sequence[str]) -> list[Answer]:
            return list(pool.map(lambda prompt: ask(address, model, prompt, max_tokens), some))

        answers(prompts[:clients])
        start = time.perf_counter()
        got = answers(prompts[clients:])
        seconds = time.perf_counter() - start
    firsts, latencies = [x.first_s for x in got], [x.seconds for x in got]
    tokens = sum(x.tokens for x in got)
    return {
        "requests": len(got),
        "prompt_tokens": round(statistics.median(x.prompt_tokens for x in got)),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "first_token_s": statistics.median(firsts),
        "first_token_p95_s": _p95(firsts),
        "latency_s": statistics.median(latencies),
        "latency_p95_s": _p95(latencies),
    }


def _p95(values: list[float]) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=20, method="inclusive")[-1]
