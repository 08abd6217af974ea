"""Random traffic for half an hour, and memory that must stay flat.

    python benchmarks/soak.py --model demo --minutes 30 --out soak

starts ``vllm-metal-tq serve`` and lets clients do, in random order, what clients do: ask whole or
as streams, with prompts and answers of any length; ask on after a prefix that others share; hold
conversations; leave early; ask for more than the budget has; send what is wrong. Memory and
counts are written to ``soak.csv`` as they go, drawn in ``flat_memory.svg``, and judged at the end.

``--model tiny`` makes a model of three layers with random weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import openai
import psutil
import serve_load
from prometheus_client.parser import text_string_to_metric_families

INTERVAL = 2.0  # seconds between samples
SPANS = 30  # into which the time is divided: minutes of half an hour
SETTLING = 1 / 3  # of the time, at the beginning, that growth is not judged by
MAX_GROWTH = 24e6  # bytes an hour of resident memory: 3 % of what the demo model's server has
MAX_LEFT = 1e6  # bytes of arrays beside pages that may be more at the end than at the start
PATIENCE = 600.0  # seconds after which a request counts as hanging
TEXT = (
    "why do the small rivers near Rome carry so much snow in March when old ships sail to "
    "an island where owls and bees live on paper clocks made of glass and bread"
)
WORDS = TEXT.split()
PREFIXES = [" ".join(WORDS[i:] + WORDS[:i]) + "." for i in range(0, 12, 3)]  # that clients share


@dataclass(frozen=True)
class Sample:
    """The server at one moment: bytes, blocks, and counts since its start."""

    seconds: float
    rss_bytes: int
    mlx_active_bytes: int
    mlx_cache_bytes: int
    kv_bytes_allocated: int
    kv_blocks_used: int
    kv_blocks_reserved: int
    prompt_cache_sequences: int
    threads: int
    open_files: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Quiet:
    """What is held when nobody asks and nothing is cached: blocks, and arrays beside pages."""

    blocks: int
    array_bytes: int


class Traffic:
    """Clients of one server, each of whom does one thing after another.

    Args:
        url: of the server, without a path.
        model: the name that it serves.
        words: of a prompt, at most.
        max_tokens: of an answer, at most.

    Attributes:
        outcomes: what became of requests: ``answered``, ``left``, ``full`` (503), ``too long``
            and ``invalid`` (400), and ``wrong``, which nothing may be.
        wrong: a line for each of these.
    """

    def __init__(self, url: str, model: str, words: int, max_tokens: int):
        self._api = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        self._model = model
        self._words = words
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, clients: int, seconds: float, seed: int = 0) -> None:
        """Let so many clients ask for so long."""
        end = time.monotonic() + seconds
        chances = [random.Random(seed + i) for i in range(clients)]
        threads = [threading.Thread(target=self._client, args=(c, end)) for c in chances]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, chance: random.Random, end: float) -> None:
        acts = {
            self._ask: 8,
            self._ask_after_prefix: 4,
            self._converse: 2,
            self._leave: 4,
            self._ask_too_much: 1,
            self._ask_wrongly: 1,
        }
        while time.monotonic() < end:
            (act,) = chance.choices(list(acts), list(acts.values()))
            self._count(self._outcome(act, chance))

    def _outcome(self, act: Callable[[random.Random], str], chance: random.Random) -> str:
        try:
            return act(chance)
        except openai.APIStatusError as error:
            if error.status_code == 503 and error.code == "kv_cache_full":
                time.sleep(chance.random())
                return "full"
            return self._is_wrong(act, error)
        except Exception as error:
            return self._is_wrong(act, error)

    def _is_wrong(self, act: Callable[[random.Random], str], error: Exception) -> str:
        with self._lock:
            self.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")
        return "wrong"

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def _ask(self, chance: random.Random) -> str:
        self._answer(chance, [{"role": "user", "content": self._text(chance)}])
        return "answered"

    def _ask_after_prefix(self, chance: random.Random) -> str:
        prefix = {"role": "system", "content": chance.choice(PREFIXES)}
        self._answer(chance, [prefix, {"role": "user", "content": self._text(chance)}])
        return "answered"

    def _converse(self, chance: random.Random) -> str:
        messages = []
        for _ in range(chance.randint(2, 4)):
            messages.append({"role": "user", "content": self._text(chance, self._words // 4)})
            reply = self._answer(chance, messages)
            messages.append({"role": "assistant", "content": reply})
        return "answered"

    def _leave(self, chance: random.Random) -> str:
        messages = [{"role": "user", "content": self._text(chance)}]
        if chance.random() < 0.5:
            with self._create(chance, messages, stream=True) as stream:
                list(islice(stream, chance.randrange(self._max_tokens // 2)))
        else:
            try:
                self._create(chance, messages, timeout=0.05 + 2 * chance.random())
            except openai.APITimeoutError:
                return "left"
            return "answered"
        return "left"

    def _ask_too_much(self, chance: random.Random) -> str:
        try:
            self._create(chance, [{"role": "user", "content": "a"}], max_tokens=10**6)
        except openai.BadRequestError as error:
            if error.code == "context_length_exceeded":
                return "too long"
            raise
        raise ValueError("a million tokens were promised")

    def _ask_wrongly(self, chance: random.Random) -> str:
        field, value = chance.choice(
            [("temperature", "hot"), ("top_k", -5), ("stop", [5]), ("logit_bias", {"x": 1})]
        )
        try:
            self._create(chance, [{"role": "user", "content": "a"}], extra_body={field: value})
        except openai.BadRequestError:
            return "invalid"
        raise ValueError(f"{field} {value!r} was taken")

    def _answer(self, chance: random.Random, messages: list[Any]) -> str:
        if chance.random() < 0.5:
            return self._create(chance, messages).choices[0].message.content or ""
        with self._create(chance, messages, stream=True) as stream:
            return "".join(part.choices[0].delta.content or "" for part in stream)

    def _create(self, chance: random.Random, messages: list[Any], **options: Any) -> Any:
        options = {
            "max_tokens": chance.randint(1, self._max_tokens),
            "temperature": chance.choice([0, 1]),
            "timeout": PATIENCE,
        } | options
        create = self._api.chat.completions.create
        return create(model=self._model, messages=messages, **options)

    def _text(self, chance: random.Random, words: int | None = None) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, words or self._words)))


def metrics(url: str) -> dict[str, float]:
    """What ``/metrics`` says, by name; requests of all outcomes are added up."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, float] = defaultdict(float)
    for sample in (sample for family in families for sample in family.samples):
        found[sample.name.removeprefix("turboquant_")] += sample.value
    return dict(found)


def sample(url: str, process: psutil.Process, started: float) -> Sample:
    """The server now."""
    found = metrics(url)
    own = {
        "seconds": round(time.monotonic() - started, 1),
        "rss_bytes": process.memory_info().rss,
        "threads": process.num_threads(),
        "open_files": process.num_fds(),
        "requests": int(found["requests_total"]),
        "tokens": int(found["generated_tokens_total"]),
    }
    rest = [field.name for field in fields(Sample) if field.name not in own]
    return Sample(**own, **{name: int(found[name]) for name in rest})


def quiet(url: str, load: serve_load.Load) -> Quiet:
    """The server when it has been emptied."""
    blocks = load.blocks_when_empty()
    found = metrics(url)
    return Quiet(blocks, int(found["mlx_active_bytes"] - found["kv_bytes_allocated"]))


def growth(samples: Sequence[Sample], name: str = "rss_bytes") -> float:
    """How much is held more from hour to hour, once the first third of the time is over.

    A batch takes memory and gives it back: what is held is the least of each span, of which the
    time has ``SPANS``. The growth is the median slope of all pairs of spans (Theil and Sen), which
    a few odd ones do not move.
    """
    end = samples[-1].seconds
    span = end / SPANS
    settled = [s for s in samples if s.seconds >= SETTLING * end]
    spans = groupby(settled, key=lambda s: int(s.seconds / span))
    floors = [(span * i / 3600, min(getattr(s, name) for s in of)) for i, of in spans]
    pairs = [(a, b) for i, a in enumerate(floors) for b in floors[i + 1 :]]
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)


def faults(samples: Sequence[Sample], before: Quiet, after: Quiet, wrong: int) -> list[str]:
    """Why the run has failed, a line each; none: it has passed."""
    found = []
    if wrong:
        found.append(f"{wrong} requests went wrong")
    if (hourly := growth(samples)) > MAX_GROWTH:
        found.append(f"resident memory grows by {hourly / 1e6:.1f} MB an hour")
    if after.blocks != before.blocks:
        found.append(f"{after.blocks} blocks in use when empty, {before.blocks} at the start")
    if (left := after.array_bytes - before.array_bytes) > MAX_LEFT:
        found.append(f"{left} bytes of arrays are left over")
    return found


def watch(url: str, pid: int, stop: threading.Event, samples: list[Sample], file: Path) -> None:
    """Take samples, and write each at once, until told to stop."""
    started, process = time.monotonic(), psutil.Process(pid)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Sample)])
        writer.writeheader()
        while not stop.wait(INTERVAL):
            samples.append(sample(url, process, started))
            writer.writerow(asdict(samples[-1]))
            stream.flush()


def soak(
    model: str, minutes: float, clients: int, flags: Sequence[str], file: Path
) -> dict[str, Any]:
    """Serve random traffic; returns figures, of which ``faults`` should be empty.

    Args:
        model: name or folder of a model.
        minutes: for so long.
        clients: ask at a time.
        flags: of ``serve``.
        file: where samples go, as CSV.
    """
    with serve_load.process(model, *flags) as (running, url):
        load = serve_load.Load(url, model, [])
        traffic = Traffic(url, model, words=60, max_tokens=24)
        traffic.run(clients, seconds=5)  # compiles, and makes what is made once
        before = quiet(url, load)
        samples: list[Sample] = []
        stop = threading.Event()
        arguments = (url, running.pid, stop, samples, file)
        watcher = threading.Thread(target=watch, args=arguments)
        watcher.start()
        try:
            traffic.run(clients, 60 * minutes, seed=clients)
        finally:
            stop.set()
            watcher.join()
        after = quiet(url, load)
    last = samples[-1]
    return {
        "minutes": minutes,
        "clients": clients,
        "flags": list(flags),
        "outcomes": dict(sorted(traffic.outcomes.items())),
        "tokens": last.tokens,
        "rss start / end": [samples[0].rss_bytes, last.rss_bytes],
        "rss growth an hour": round(growth(samples)),
        "quiet before": asdict(before),
        "quiet after": asdict(after),
        "wrong": traffic.wrong[:10],
        "faults": faults(samples, before, after, len(traffic.wrong)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kv-budget", default="6MB", help="small, so that it is full at times")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = ("--kv-budget", args.kv_budget)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model == "tiny":
            serve_load.tiny_model(Path(folder))
            model, flags = folder, (*flags, *serve_load.TINY_FLAGS)
        file = args.out / "soak.csv"
        figures = soak(model, args.minutes, args.clients, flags, file)
    text = json.dumps(figures, indent=1)
    (args.out / "soak.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "figures"))
    import flat_memory

    flat_memory.draw(args.out, file)
    sys.exit(1 if figures["faults"] else 0)


if __name__ == "__main__":
    main()
