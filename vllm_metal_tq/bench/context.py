"""A context that grows step by step: what its cache takes, and how fast prompt and decoding are."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from ..integrations.mlx_lm import report
from . import clock
from .caches import DENSE, Maker, arrays, maker
from .process import rss_high_water

PREFILL = 2048  # tokens of a prompt that are processed at a time, mlx_lm's default
LEAST_STEP = 2 * clock.STREAMED  # of which as many tokens are decoded as ``clock`` times


@dataclass(frozen=True)
class Step:
    """What was measured while the context grew to ``context`` tokens.

    Attributes:
        context: tokens that the cache holds at the end.
        kv_bytes: allocated for them, layers that are not compressed included.
        peak_bytes: the most that MLX held in this step, weights included.
        rss_bytes: the most that the process has had in memory since it started.
        prefill_tps: tokens a second of the step's prompt, which sees all that came before.
        decode_tps: tokens a second after it, by the median of their times.
    """

    context: int
    kv_bytes: int
    peak_bytes: int
    rss_bytes: int
    prefill_tps: float
    decode_tps: float


def model_limit(model: nn.Module) -> int | None:
    """Tokens that the model was made for, None where its config does not say."""
    args = getattr(model, "args", None)
    text = getattr(args, "text_config", None)  # where models that see keep it
    fields = text if isinstance(text, dict) else vars(text or args or object)
    return fields.get("max_position_embeddings")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(x.nbytes for x in arrays(model.parameters()))


def kv_dtype(model: nn.Module) -> str:
    """The dtype of keys and values as the model makes them, by name."""
    caches = maker(DENSE)(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    stored = arrays([cache.state for cache in caches])
    return str(stored[0].dtype).removeprefix("mlx.core.")


def contexts(step: int, limit: int) -> list[int]:
    """Multiples of ``step`` below ``limit``, and ``limit``."""
    return [*range(step, limit - LEAST_STEP + 1, step), limit]


def grow(
    model: nn.Module,
    make_cache: Maker,
    text: Sequence[int],
    lengths: Sequence[int],
    limit_bytes: int | None = None,
) -> Generator[Step, None, str | None]:
    """Grow one cache to each of ``lengths``, the last tokens of each by greedy decoding.

    Args:
        model: a model that mlx_lm has loaded.
        make_cache: makes its cache.
        text: token ids, as many as the last of ``lengths``.
        lengths: tokens in the cache after each step, ascending by ``LEAST_STEP`` at least.
        limit_bytes: the last step is the one before MLX holds more than this. None: no limit.

    Yields:
        Each step that stayed within the limit.

    Returns:
        Why it stopped before the last length, else None.
    """
    _extend(model, make_cache(model), text[:LEAST_STEP])  # compiles what can be compiled
    clock.release()
    caches, held = make_cache(model), 0
    for length in lengths:
        mx.reset_peak_memory()
        prefill_tps, decode_tps = _extend(model, caches, text[held:length])
        held, peak = length, mx.get_peak_memory()
        if limit_bytes is not None and peak > limit_bytes:
            return f"budget: {length:,} tokens peak at {peak:,} bytes, {limit_bytes:,} are allowed"
        kv_bytes = report(caches).kv_bytes
        yield Step(length, kv_bytes, peak, rss_high_water(), prefill_tps, decode_tps)
    return None


def _extend(model: nn.Module, caches: list[Any], text: Sequence[int]) -> tuple[float, float]:
    """Append as many tokens as ``text`` has; tokens a second of its prompt, and of decoding."""
    prompt = mx.array(list(text[: len(text) - clock.STREAMED]))
    streams: list[Any] = [generation_stream]
    with wired_limit(model, streams):
        first, between = clock.stream_times(_decoded(model, caches, prompt))
    return prompt.size / first, 1 / between


def _decoded(model: nn.Module, caches: list[Any], prompt: mx.array) -> Generator[int, None, None]:
    """Tokens that mlx_lm decodes after ``prompt``; the cache holds them too in the end."""
    tokens = generate_step(
        prompt,
        model,
        max_tokens=clock.STREAMED,
        prompt_cache=caches,
        prefill_step_size=PREFILL,
    )
    for token, _ in tokens:
        yield int(token)
    mx.eval([cache.state for cache in caches])  # the last token, which is on its way
