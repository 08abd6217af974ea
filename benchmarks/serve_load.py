"""Many clients at once for a while, some of whom leave early: is all freed, and is each answered?

    python benchmarks/serve_load.py --model demo --clients 32 --seconds 120

starts ``vllm-metal-tq serve``, asks each of some prompts alone first, and then lets clients ask
them in random order, as streams and in one piece, a part of whom close their connection at a
random moment. Then, as at the start, one request takes the whole budget, so that nothing stays
cached: the blocks in use must be as many as before.

Whose answer it is shows in its tokens and their log-probabilities: each answer is compared with
all that were given alone, and must be nearest to that of its own prompt. Streams have no
log-probabilities; of them only the text is compared.

``--model tiny`` makes a model of three layers with random weights, for which a CPU is enough.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai

THINGS = (
    "violins",
    "zebras",
    "lanterns",
    "the Moon",
    "bread",
    "chess",
    "rivers",
    "Rome",
    "bees",
    "clocks",
    "tea",
    "glass",
    "snow",
    "ships",
    "paper",
    "owls",
)
PROMPTS = [f"Tell me about {thing}." for thing in THINGS]
# What a random model says depends on the last letters most: see whether they are its own.
TINY_PROMPTS = [f"client {i} says {c * 3 * i}" for i, c in enumerate("aQ7+xZ%k", 2)]
TINY_FLAGS = ("--preset", "tq8", "--no-calibrate")  # so that cached pages change little


@dataclass(frozen=True)
class Answer:
    """What a client got: its text and, if it came in one piece, tokens and log-probabilities."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    def distance(self, other: Answer) -> float:
        """The largest difference of log-probabilities, up to the first token that differs.

        That adds the more the earlier it comes: 1 at the first, 1/2 at the second place.
        """
        far = 0.0
        for i, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            far = max(far, abs(self.logprobs[i] - other.logprobs[i]))
            if mine != theirs:
                return far + 1 / (i + 1)
        return far


@dataclass
class Report:
    """What became of the requests.

    Attributes:
        seconds: how long clients went on asking.
        latencies: seconds that requests took which were answered in full.
        first: seconds to the first piece of streams.
        outcomes: how many were ``answered``, ``left`` early, or ``refused`` with 503.
        equal: how many answers have the text that their prompt gets alone.
        wrong: what is nearer to another prompt's answer, or failed: one line each.
        drift: the largest distance from the answer that a prompt gets alone.
        apart: the smallest distance between those of two prompts.
    """

    seconds: float
    apart: float
    latencies: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    outcomes: Counter = field(default_factory=Counter)
    equal: int = 0
    wrong: list[str] = field(default_factory=list)
    drift: float = 0.0


class Load:
    """Clients of one server.

    Args:
        url: of the server, without a path.
        model: the name that it serves.
        prompts: texts, each asked as a chat message, or as they are without ``chat``.
        max_tokens: of an answer.
        chat: see there.
    """

    def __init__(
        self, url: str, model: str, prompts: list[str], max_tokens: int = 16, chat: bool = True
    ):
        self.url = url
        self._model = model
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._chat = chat
        self._lock = threading.Lock()

    def health(self) -> dict:
        """What ``/health`` says."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=60) as answer:
            return json.load(answer)

    def blocks_when_empty(self) -> int:
        """Blocks in use after a request that was promised all of them, and left at once.

        That drops whatever was cached; itself it leaves nothing.
        """
        state = self.health()
        tokens = (state["kv_blocks_total"] - 2) * state["kv_block_tokens"] - 1
        fields = {"model": self._model, "prompt": "a", "max_tokens": tokens, "stream": True}
        with self._client().completions.create(**fields) as stream:
            next(iter(stream), None)
        for _ in range(600):
            time.sleep(0.1)
            state = self.health()
            if state["kv_blocks_reserved"] == 0 and state["prompt_cache_sequences"] == 0:
                break
        return state["kv_blocks_used"]

    def run(self, clients: int, seconds: float, leave: float = 0.25, seed: int = 0) -> Report:
        """Let ``clients`` ask for so many seconds, a part of whom (``leave``) do not wait."""
        self._alone = {p: self._ask(self._client(), p) for p in self._prompts}
        answers = list(self._alone.values())
        pairs = [(a, b) for i, a in enumerate(answers) for b in answers[:i]]
        report = Report(seconds, min(a.distance(b) for a, b in pairs))
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._talk, args=(random.Random(seed + i), end, leave, report))
            for i in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return report

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=600)

    def _create(self, client: openai.OpenAI, prompt: str, **fields):
        fields |= {"model": self._model, "max_tokens": self._max_tokens, "temperature": 0}
        if self._chat:
            messages = [{"role": "user", "content": prompt}]
            return client.chat.completions.create(messages=messages, **fields)
        return client.completions.create(prompt=prompt, **fields)

    def _ask(self, client: openai.OpenAI, prompt: str) -> Answer:
        choice = self._create(client, prompt, logprobs=True).model_dump()["choices"][0]
        text = choice["message"]["content"] if self._chat else choice["text"]
        tokens = choice["logprobs"]["content"]
        logprobs = tuple(token["logprob"] for token in tokens)
        return Answer(text or "", tuple(token["id"] for token in tokens), logprobs)

    def _talk(self, chance: random.Random, end: float, leave: float, report: Report) -> None:
        client = self._client()
        while time.monotonic() < end:
            prompt = chance.choice(self._prompts)
            started = time.monotonic()
            try:
                act = self._stream if chance.random() < 0.5 else self._whole
                act(client, prompt, chance if chance.random() < leave else None, report)
            except openai.APITimeoutError:
                self._count(report, "left")
            except openai.InternalServerError as error:
                if error.status_code != 503:
                    report.wrong.append(f"{prompt}: {error}")
                self._count(report, "refused")
                time.sleep(chance.random())
            except openai.OpenAIError as error:
                report.wrong.append(f"{prompt}: {error}")
            else:
                report.latencies.append(time.monotonic() - started)

    def _whole(self, client, prompt: str, leaves: random.Random | None, report: Report) -> None:
        if leaves:
            client = client.with_options(timeout=0.05 + leaves.random())
        answer = self._ask(client, prompt)
        own = answer.distance(self._alone[prompt])
        nearest = min(self._alone.values(), key=answer.distance)
        with self._lock:
            report.outcomes["answered"] += 1
            report.drift = max(report.drift, own)
            report.equal += answer.text == self._alone[prompt].text
            if answer.distance(nearest) < own:
                other = answer.distance(nearest)
                report.wrong.append(f"{prompt}: {answer.text!r} is {own:.3g} off, and {other:.3g}")

    def _stream(self, client, prompt: str, leaves: random.Random | None, report: Report) -> None:
        started, text = time.monotonic(), ""
        pieces = leaves.randrange(self._max_tokens) if leaves else None
        with self._create(client, prompt, stream=True) as stream:
            for i, part in enumerate(stream):
                if i == 0:
                    report.first.append(time.monotonic() - started)
                if i == pieces:
                    raise openai.APITimeoutError(stream.response.request)
                choice = part.choices[0]
                text += (choice.delta.content if self._chat else choice.text) or ""
        with self._lock:
            report.outcomes["answered"] += 1
            report.equal += text == self._alone[prompt].text

    def _count(self, report: Report, outcome: str) -> None:
        with self._lock:
            report.outcomes[outcome] += 1


def percentile(values: list[float], share: float) -> float:
    """The value below which so large a share lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def tiny_model(folder: Path) -> None:
    """Write a model of three layers with random weights, one token a character."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import models
    import serving

    model = models.llama()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {"model_type": "llama", **vars(model.args)}
    (folder / "config.json").write_text(json.dumps(config))
    serving.tokenizer().save_pretrained(str(folder))


@contextmanager
def server(model: str, *flags: str):
    """``vllm-metal-tq serve`` on a free port; yields its URL."""
    with process(model, *flags) as (_, url):
        yield url


@contextmanager
def process(model: str, *flags: str):
    """The same; yields its process as well, ``(Popen, url)``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "import sys; from vllm_metal_tq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "--model", model, "--port", str(port)]
    command += ["--log-level", "ERROR", *flags]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if not running.stdout.readline():
            raise RuntimeError("the server did not start")
        yield running, f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--leave", type=float, default=0.25, help="share that leaves early")
    parser.add_argument("--kv-budget", default="200MB")
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, prompts, flags = args.model, PROMPTS, ()
        if model == "tiny":
            tiny_model(Path(folder))
            model, prompts, flags = folder, TINY_PROMPTS, TINY_FLAGS
        with server(model, "--kv-budget", args.kv_budget, *flags) as url:
            load = Load(url, model, prompts, args.max_tokens, chat=args.model != "tiny")
            before = load.blocks_when_empty()
            report = load.run(args.clients, args.seconds, args.leave)
            after = load.blocks_when_empty()
    figures = {
        "clients": args.clients,
        "seconds": args.seconds,
        **report.outcomes,
        "equal": report.equal,
        "drift": report.drift,
        "apart": report.apart,
        "wrong": len(report.wrong),
        "blocks before": before,
        "blocks after": after,
        "latency p50 / p99": [percentile(report.latencies, p) for p in (0.5, 0.99)],
        "first token p50 / p99": [percentile(report.first, p) for p in (0.5, 0.99)],
    }
    print(json.dumps(figures, indent=1))
    for line in report.wrong[:10]:
        print(line)
    sys.exit(1 if report.wrong or before != after else 0)


if __name__ == "__main__":
    main()
