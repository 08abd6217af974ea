"""Requests to a server that runs: bodies, headers, and bytes that are no request."""

import json
import logging
import socket
import time
from contextlib import ExitStack
from functools import cache

import models
import serving
from harness import Finding, Target
from hypothesis import strategies as st
from mutations import damaged, json_values, mostly, mutated, numbers, texts

from vllm_metal_tq.integrations.mlx_lm.server import ServerOptions

TIMEOUT = 0.5  # seconds that the server gives a client
MAX_BODY = 100_000
REFUSED = {*range(400, 500), 501, 505}  # 501: no such method; 505: no such version of HTTP
GOOD = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "logit_bias": {str(serving.END): -100}}
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}
_running = ExitStack()


@cache
def server():
    logging.disable(logging.CRITICAL)
    limits = ServerOptions(max_body_bytes=MAX_BODY, client_timeout=TIMEOUT)
    made = serving.server(model=models.llama(num_hidden_layers=1), blocks=6, limits=limits)
    return _running.enter_context(made)


@cache
def expected() -> str:
    return _text()


def close() -> None:
    _running.close()
    server.cache_clear()
    logging.disable(logging.NOTSET)


def _text() -> str:
    status, text, _ = serving.post(server(), GOOD)
    if status != 200:
        raise Finding(f"a good request is answered with {status}: {text}")
    return json.loads(text)["choices"][0]["text"]


counts = st.integers(0, 4) | numbers
shares = st.floats(0, 1) | numbers
fields = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), st.integers(1, 4) | numbers),
    **dict.fromkeys(("top_k", "top_logprobs", "num_draft_tokens"), counts),
    **dict.fromkeys(("temperature", "top_p", "min_p", "xtc_probability", "xtc_threshold"), shares),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), shares),
    **{f"{kind}_context_size": counts for kind in ("repetition", "presence", "frequency")},
    "seed": counts,
    "logit_bias": st.dictionaries(st.integers(-1, 99).map(str) | texts, numbers, max_size=3),
    **dict.fromkeys(("stream", "logprobs"), st.booleans()),
    "stream_options": st.just({"include_usage": True}) | json_values,
    "stop": texts | st.lists(texts, max_size=3),
    "model": st.sampled_from(["tiny", "default_model", "../tiny", ""]),
    "chat_template_kwargs": st.dictionaries(texts, json_values, max_size=2),
    **dict.fromkeys(("tools", "adapters", "draft_model", "response_format"), json_values),
    "role_mapping": st.dictionaries(texts, json_values, max_size=2),
    "prompt": texts | json_values,
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": mostly(st.sampled_from(["user", "system", "assistant", "tool"]), json_values)},
            optional={"content": texts | json_values, "tool_calls": json_values, "name": texts},
        ),
        max_size=3,
    ),
}


@st.composite
def bodies(draw) -> bytes:
    """JSON of a request: a good one with fields of all kinds, or worse."""
    body = dict(draw(st.sampled_from([GOOD, CHAT])))
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
        body[name] = draw(mostly(fields[name], json_values))
    match draw(
        mostly(st.just("fields"), st.sampled_from(["changed", "bytes", "deep", "other"]), 4)
    ):
        case "changed":
            body = draw(mutated(body))
        case "bytes":
            return draw(damaged(json.dumps(body).encode()) | st.binary(max_size=40))
        case "deep":
            return b'{"prompt":' + b"[" * draw(st.sampled_from([1000, 50_000])) + b"1"
        case "other":
            body = draw(json_values)
    return json.dumps(body).encode()


@st.composite
def requests(draw) -> tuple[str, bytes]:
    """How the bytes are sent, and the bytes."""
    body = draw(bodies())
    path = draw(
        mostly(
            st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
            st.sampled_from(["/", "/health", "/v1/models", "/v1/models/x", "/metrics", "//", "*"])
            | st.sampled_from(["/v1/completions?x=1", "/%00", "/" + "a" * 70_000]),
        )
    )
    method = draw(mostly(st.just("POST"), st.sampled_from(["GET", "OPTIONS", "PUT", "", "post"])))
    length = draw(
        mostly(
            st.just(str(len(body))), st.sampled_from(["-1", "0", "1e3", "", "9" * 30, "+2", "1_0"])
        )
    )
    headers = [b"Host: x", b"Content-Length: " + length.encode()]
    odd = [
        *(b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Expect: 100-continue"),
        *(b"no colon", b"X: " + b"y" * 70_000, b": ", b" folded", b"X: \xff\xfe", b"X: \0"),
        *(b"Content-Type: text/html", b"Connection: keep-alive", b"Origin: http://x"),
    ]
    headers += draw(mostly(st.just([]), st.lists(st.sampled_from(odd), max_size=2)))
    if draw(st.integers(0, 40)) == 0:
        headers += [b"X-%d: y" % i for i in range(150)]
    version = draw(
        mostly(st.just("HTTP/1.1"), st.sampled_from(["HTTP/1.0", "HTTP/9", "", "x"]), 16)
    )
    data = (
        f"{method} {path} {version}".encode() + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body
    )
    if draw(st.integers(0, 20)) == 0:
        data = draw(damaged(data))
    return draw(mostly(st.just("whole"), st.sampled_from(["half", "gone", "pieces"]))), data


def check_request(case: tuple[str, bytes]) -> str:
    how, data = case
    good = expected()
    status, rest = _answer(server(), how, data)
    if not server().generator.healthy:
        raise Finding("the server does not answer any more")
    if len(data) % 16 == 0 and _text() != good:
        raise Finding("a good request is answered otherwise than before")
    if status is None:
        return "no answer" if how != "gone" else "client gone"
    if status in (200, 204):  # 204: OPTIONS
        return "answered"
    if status not in REFUSED:
        raise Finding(f"status {status}: {rest[:300]}")
    error = json.loads(rest)["error"]
    if not error["message"].strip():
        raise Finding("an error says nothing")
    return f"refused with {status}"


def _answer(served, how: str, data: bytes) -> tuple[int | None, bytes]:
    """The status of the answer, None where there is none, and its body."""
    with socket.create_connection(served.server_address, timeout=50) as connection:
        try:
            for start in range(0, len(data), 40) if how == "pieces" and len(data) < 800 else [0]:
                connection.sendall(data[start : start + 40] if how == "pieces" else data)
                if how == "pieces":
                    time.sleep(0.001)
            if how == "gone":
                return None, b""
            if how == "half":
                connection.shutdown(socket.SHUT_WR)
        except OSError:  # it has answered and closed before it had all
            pass
        try:
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            return None, b""
        except TimeoutError:
            raise Finding("no answer for 50 s") from None
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/"):
        return None, answer
    return int(head.split()[1]), rest


TARGETS = [Target("requests to the server", 1500, requests(), check_request, close)]
