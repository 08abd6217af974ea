import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_metal_tq.bench import serve

PAUSE = 0.05  # seconds before the first text, and again before the end


class Stub(BaseHTTPRequestHandler):
    """Answers as both servers do: comments, a piece without text, text, a count."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self.answer(body)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, body):
        if "status" in body["prompt"]:
            self.send_error(503, "full")
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b": keepalive 1/2\n\n")
        self.event({"choices": [{"text": ""}]})
        time.sleep(PAUSE)
        self.event({"choices": [{"text": "one"}]})
        time.sleep(PAUSE)
        if "error" in body["prompt"]:
            self.event({"error": {"message": "no room"}})
        elif "cut" not in body["prompt"]:
            self.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, fields):
        self.wfile.write(b"data: " + json.dumps(fields).encode() + b"\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.lock, stub.bodies, stub.now, stub.most = threading.Lock(), [], 0, 0
    thread = threading.Thread(target=stub.serve_forever, args=[0.01])
    thread.start()
    yield stub
    stub.shutdown()
    thread.join()
    stub.server_close()


def test_an_answer_has_its_first_text_and_its_end(server):
    answer = serve.ask(server.server_address, "m", "hello", 7)
    assert PAUSE <= answer.first_s < 2 * PAUSE <= answer.seconds
    assert (answer.prompt_tokens, answer.tokens) == (5, 3)
    (body,) = server.bodies
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("m", "hello", 7)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("status", "^status 503"), ("error", "no room"), ("cut", "without a count of tokens")],
)
def test_what_is_no_answer_is_an_error(server, prompt, message):
    with pytest.raises(ValueError, match=message):
        serve.ask(server.server_address, "m", prompt, 7)


def test_clients_ask_together_and_the_warm_up_is_not_counted(server):
    prompts = [f"prompt {i}" for i in range(9)]
    figures = serve.load(server.server_address, "m", prompts, 3, 7)
    assert server.most == 3
    assert sorted(body["prompt"] for body in server.bodies) == prompts
    assert (figures["requests"], figures["tokens"], figures["prompt_tokens"]) == (6, 18, 5)
    # Two rounds of three clients.
    assert 18 / figures["tokens_per_s"] >= 4 * PAUSE
    assert PAUSE <= figures["first_token_s"] <= figures["first_token_p95_s"]
    assert 2 * PAUSE <= figures["latency_s"] <= figures["latency_p95_s"]


def test_a_percentile_lies_where_it_should():
    assert serve._p95([3.0]) == 3.0
    assert serve._p95([float(i) for i in range(101)]) == 95.0


def test_excerpts_begin_at_different_words():
    text = " ".join(str(i) for i in range(20))
    found = serve.excerpts(text, 11, 5)
    assert [part.split()[0] for part in found] == ["0", "2", "4", "6", "8"]
    assert {len(part.split()) for part in found} == {11}
    with pytest.raises(ValueError, match="the text has 20 words: too few for 5 parts of 17"):
        serve.excerpts(text, 17, 5)
