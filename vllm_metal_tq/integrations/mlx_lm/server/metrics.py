"""What a server counts, and how Prometheus reads it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

import mlx.core as mx

from ..pools import CachePools
from .admission import Admission
from .errors import APIError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

WINDOW = 10.0  # seconds over which tokens a second are measured
OUTCOMES = ("finished", "cancelled", "refused", "invalid", "failed")


class Stats:
    """Counts of requests and tokens. Threads may share it.

    Attributes:
        running: requests that have not been answered in full.
        outcomes: requests by how they ended: ``finished``; ``cancelled`` by the client;
            ``refused``, because the KV cache had no room; ``invalid``, by the client's fault;
            ``failed``, by the server's.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._recent: deque[float] = deque()
        self.running = 0
        self.outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.prompts, self.prompt_seconds = 0, 0.0
        self.requests, self.request_seconds = 0, 0.0

    def begin(self) -> None:
        """A request is there."""
        with self._lock:
            self.running += 1

    def end(self, outcome: str, started: float) -> None:
        """The request that came at ``started`` has ended."""
        with self._lock:
            self.running -= 1
            self.outcomes[outcome] += 1
            self.requests += 1
            self.request_seconds += time.monotonic() - started

    def prompt(self, tokens: int, cached: int, started: float) -> None:
        """A prompt was processed, ``cached`` of its tokens by the prompt cache."""
        with self._lock:
            self.prompt_tokens += tokens
            self.cached_tokens += cached
            self.prompts += 1
            self.prompt_seconds += time.monotonic() - started

    def token(self) -> None:
        """A token was generated."""
        now = time.monotonic()
        with self._lock:
            self.generated_tokens += 1
            self._recent.append(now)
            self._forget(now)

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated in the last ``WINDOW`` seconds, a second."""
        with self._lock:
            self._forget(time.monotonic())
            return len(self._recent) / WINDOW

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that the prompt cache held."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0] < now - WINDOW:
            self._recent.popleft()


def kv_state(pools: CachePools, admission: Admission, cached_sequences: int) -> dict[str, int]:
    """Blocks and bytes of the page pools, by the names that ``/metrics`` gives them.

    Total is the budget, or without one what is allocated; free is what of it is not in use.
    """
    used, total = pools.used_blocks, pools.max_blocks
    total = max(pools.num_blocks, used) if total is None else total
    size = pools.block_bytes
    return {
        "kv_blocks_used": used,
        "kv_blocks_free": total - used,
        "kv_blocks_total": total,
        "kv_blocks_reserved": admission.outstanding,
        "kv_block_tokens": pools.block_size,
        "kv_bytes_used": used * size,
        "kv_bytes_free": (total - used) * size,
        "kv_bytes_total": total * size,
        "kv_bytes_allocated": pools.nbytes,
        "prompt_cache_sequences": cached_sequences,
    }


_KV_HELP = {
    "kv_blocks_used": "Blocks that hold tokens, shared ones counted once",
    "kv_blocks_free": "Blocks that hold none",
    "kv_blocks_total": "Blocks of the budget, or allocated where there is none",
    "kv_blocks_reserved": "Blocks that running requests may still take",
    "kv_block_tokens": "Tokens that a block holds",
    "kv_bytes_used": "Bytes of used blocks, in all layers without a window",
    "kv_bytes_free": "Bytes of free blocks",
    "kv_bytes_total": "Bytes of all blocks",
    "kv_bytes_allocated": "Bytes that the page pools have allocated, those of windows too",
    "prompt_cache_sequences": "Earlier prompts that are kept",
}


def exposition(stats: Stats, kv_state: dict[str, int]) -> tuple[bytes, str]:
    """What ``/metrics`` answers, and its content type.

    Args:
        stats: the counts.
        kv_state: what the function of that name returned.

    Raises:
        APIError: prometheus_client is not installed.
    """
    try:
        import prometheus_client
    except ImportError:
        message = "/metrics needs prometheus_client: pip install 'vllm-metal-tq[serve]'"
        raise APIError(501, message, "not_installed") from None
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Collector(list(_families(stats, kv_state))))
    return prometheus_client.generate_latest(registry), prometheus_client.CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _families(stats: Stats, kv_state: dict[str, int]) -> Iterator[Metric]:
    from prometheus_client import core

    def gauge(name: str, help_text: str, value: float) -> Metric:
        return core.GaugeMetricFamily(f"turboquant_{name}", help_text, value)

    def counter(name: str, help_text: str, value: float) -> Metric:
        return core.CounterMetricFamily(f"turboquant_{name}", help_text, value)

    def seconds(name: str, help_text: str, count: int, total: float) -> Metric:
        name = f"turboquant_{name}_seconds"
        return core.SummaryMetricFamily(name, help_text, count_value=count, sum_value=total)

    for name, value in kv_state.items():
        yield gauge(name, _KV_HELP[name], value)
    yield gauge("mlx_active_bytes", "Bytes of MLX's arrays", mx.get_active_memory())
    yield gauge("mlx_cache_bytes", "Bytes that MLX keeps for new arrays", mx.get_cache_memory())
    yield gauge("requests_running", "Requests that are being answered", stats.running)
    ended = core.CounterMetricFamily(
        "turboquant_requests", "Requests that have ended, by how", labels=["outcome"]
    )
    for outcome in OUTCOMES:
        ended.add_metric([outcome], stats.outcomes[outcome])
    yield ended
    yield counter("prompt_tokens", "Tokens of prompts", stats.prompt_tokens)
    yield counter("prompt_tokens_cached", "Those that the prompt cache held", stats.cached_tokens)
    yield gauge("prefix_hit_ratio", "Cached prompt tokens of all prompt tokens", stats.hit_rate)
    yield counter("generated_tokens", "Tokens generated", stats.generated_tokens)
    yield gauge(
        "tokens_per_second", "Tokens generated in the last 10 seconds", stats.tokens_per_second
    )
    yield seconds("first_token", "To the first token", stats.prompts, stats.prompt_seconds)
    yield seconds("request", "To the end of a request", stats.requests, stats.request_seconds)
