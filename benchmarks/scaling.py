"""What a second Mac, a stronger compression and more replicas are worth: the tables of the docs.

Estimates from the planner's data and from the bandwidths and latencies below; nothing is measured.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from dataclasses import dataclass

from vllm_metal_tq.config import PRESETS, TurboQuantConfig
from vllm_metal_tq.plan import machine, models, sources
from vllm_metal_tq.plan.caches import MlxCache, Scheme
from vllm_metal_tq.plan.weights import linear

CHIP = "M4 Pro"
MODEL, WEIGHTS_BITS = "llama-3.1-8b", 4
CONTEXTS = (8_192, 32_768, 131_072)
ACTIVATION = 2  # bytes of an element that is sent
CACHE_SHARE = 0.8  # of what the weights leave, as `plan` has it


@dataclass(frozen=True)
class Link:
    """A way between two Macs: bytes a second, and seconds until a small message is there."""

    name: str
    bandwidth: float
    latency: float


LINKS = (
    Link("10 Gbit/s Ethernet", 1.25e9, 300e-6),
    Link("Thunderbolt 4, TCP", 5e9, 300e-6),
    Link("Thunderbolt 5, RDMA", 10e9, 50e-6),
)


class Sized:
    """A shipped model with 4-bit weights, whole or divided evenly among machines."""

    def __init__(self, name: str):
        config = sources.shipped()[name]["config"]
        self.model = models.read(name, config)
        self.layers, self.hidden = config["num_hidden_layers"], config["hidden_size"]
        head = linear(self.hidden, config["vocab_size"])  # which mlx_lm leaves whole in all
        read = self.model.weight_bytes(WEIGHTS_BITS, self.model.weights.read_by(1))
        self._head = head.nbytes(WEIGHTS_BITS)
        self._read, self._held = read, self.model.weight_bytes(WEIGHTS_BITS)

    def _cache(self, preset: str | None) -> MlxCache:
        config = TurboQuantConfig.from_names(preset) if preset else None
        return MlxCache(self.model, Scheme(preset or "bf16", config))

    def seconds(self, preset: str | None, context: int, machines: int = 1) -> float:
        """What reading weights and cache once takes, which bounds a step from below."""
        weights = (self._read - self._head) / machines + self._head
        cache = self._cache(preset).read_bytes(context) / machines
        return (weights + cache) / machine.bandwidth(CHIP)

    def longest(self, preset: str | None, memory: str, machines: int = 1) -> int:
        """Tokens of one sequence for which each machine has room."""
        allowed = machine.estimated(machine.memory_size(memory)).working_set_bytes
        weights = (self._held - self._head) / machines + self._head
        room = CACHE_SHARE * (allowed - weights)
        return int(room * machines / self._cache(preset).token_bytes)

    @property
    def reductions(self) -> int:
        """All-reduces of a step: after attention and after the MLP of each layer."""
        return 2 * self.layers

    def sending(self, link: Link) -> float:
        """Seconds of a step's all-reduces between two machines, each with one latency."""
        each = link.latency + ACTIVATION * self.hidden / link.bandwidth
        return self.reductions * each


def traffic() -> list[dict[str, str]]:
    """Messages and bytes of one token between two machines."""
    rows = []
    for name in ("llama-3.2-1b", MODEL, "qwen3-8b", "gpt-oss-20b"):
        sized = Sized(name)
        vector = ACTIVATION * sized.hidden
        rows.append(
            {
                "model": name,
                "layers": str(sized.layers),
                "hidden_size": f"{sized.hidden:,}",
                "tensor parallel: messages": str(sized.reductions),
                "KiB": f"{sized.reductions * vector / 1024:.0f}",
                "pipeline: messages": "2",
                "KiB, pipeline": f"{2 * vector / 1024:.0f}",
            }
        )
    return rows


def speeds() -> list[dict[str, str]]:
    """Tokens a second of one sequence on one and on two machines."""
    sized, rows = Sized(MODEL), []
    for context in CONTEXTS:
        row = {"context": f"{context:,}"}
        for preset in (None, "tq4", "tq2"):
            row[f"one, {preset or 'bf16'}"] = f"{1 / sized.seconds(preset, context):.0f}"
        for preset in (None, "tq4"):
            for link in LINKS:
                seconds = sized.seconds(preset, context, 2) + sized.sending(link)
                row[f"two, {preset or 'bf16'}: {link.name}"] = f"{1 / seconds:.0f}"
        rows.append(row)
    return rows


def break_even() -> list[dict[str, str]]:
    """The latency below which the second machine is faster than compression on one."""
    sized, rows = Sized(MODEL), []
    for context in CONTEXTS:
        row = {"context": f"{context:,}"}
        for preset in PRESETS:
            gained = sized.seconds(preset, context) - sized.seconds(None, context, 2)
            latency = gained / sized.reductions - ACTIVATION * sized.hidden / LINKS[-1].bandwidth
            row[preset] = f"{latency * 1e6:.0f}" if latency > 0 else "never"
        rows.append(row)
    return rows


def room() -> list[dict[str, str]]:
    """The longest context of one sequence, in thousands of tokens."""
    sized, rows = Sized(MODEL), []
    for memory in ("8GB", "16GB", "24GB"):
        row = {"each Mac": memory.replace("GB", " GB")}
        for machines, word in ((1, "one"), (2, "two")):
            for preset in (None, "tq4"):
                tokens = sized.longest(preset, memory, machines)
                row[f"{word}, {preset or 'bf16'}"] = f"{tokens // 1000:,}" if tokens > 0 else "none"
        rows.append(row)
    return rows


CONVERSATIONS = 96  # that go on at the same time
TURNS = 8
SYSTEM, TURN = 400, 300  # tokens that all begin with; of a message and its answer
KEPT = 10  # earlier prompts that a replica keeps, `serve`'s default
SEEDS = range(5)


@dataclass
class Served:
    """Tokens of all prompts, and those that were found in a cache."""

    tokens: int = 0
    cached: int = 0


def route(replicas: int, affinity: bool, kept: int, seed: int) -> Served:
    """Serve conversations of several turns by replicas, each with the prompts it served last.

    Args:
        replicas: how many servers there are.
        affinity: whether a conversation always goes to the same one; else to a random one.
        kept: prompts that each keeps.
        seed: of the order of requests and of random routes.
    """
    rng, served = random.Random(seed), Served()
    caches: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(replicas)]
    asked = [c for c in range(CONVERSATIONS) for _ in range(TURNS)]
    rng.shuffle(asked)
    turns = [0] * CONVERSATIONS
    for conversation in asked:
        turns[conversation] += 1
        prompt = SYSTEM + turns[conversation] * TURN
        digest = hashlib.sha256(b"%d" % conversation).digest()
        which = digest[0] % replicas if affinity else rng.randrange(replicas)
        cache = caches[which]
        # Of another conversation's prompt only the beginning is the same.
        found = cache.get(conversation, SYSTEM if cache else 0)
        served.tokens, served.cached = served.tokens + prompt, served.cached + found
        cache[conversation] = prompt
        cache.move_to_end(conversation)
        if len(cache) > kept:
            cache.popitem(last=False)
    return served


def hit_rate(replicas: int, affinity: bool, kept: int) -> float:
    """The share of prompt tokens that need no prefill."""
    runs = [route(replicas, affinity, kept, seed) for seed in SEEDS]
    return sum(run.cached for run in runs) / sum(run.tokens for run in runs)


def routing() -> list[dict[str, str]]:
    """Hit rates by the number of replicas."""
    rows = []
    for replicas in (1, 2, 4, 8):
        row = {"replicas": str(replicas)}
        for kept in (KEPT, 4 * KEPT):
            for affinity in (False, True):
                rate = hit_rate(replicas, affinity, kept)
                row[f"{'affinity' if affinity else 'random'}, {kept} kept"] = f"{100 * rate:.0f} %"
        rows.append(row)
    return rows


TABLES = (traffic, speeds, break_even, room, routing)


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a table of the documentation."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    for table in TABLES:
        print(f"{table.__doc__}\n\n{markdown(table())}\n")


if __name__ == "__main__":
    main()
