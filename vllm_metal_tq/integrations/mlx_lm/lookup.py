"""Prompt lookup: speculative decoding whose drafts are what followed the last words before.

No draft model is needed, and where nothing repeats nothing is drafted. The model verifies a draft
in one step, and what it refuses is trimmed, so that the tokens are those of plain decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...tail import FEW
from ...types import Progress, PromptCache
from .cache import TurboQuantKVCache
from .parts import parts

MAX_DRAFT = FEW - 1  # with the token before them, drafts are a chunk that sees the tail
_LENGTHS = (3, 2)  # tokens that must repeat, the longest tried first


class Seen:
    """A text, and what followed each of its n-grams the last time."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}

    def add(self, token: int) -> None:
        """Append a token to the text."""
        for length in _LENGTHS:
            if len(self._tokens) >= length:
                self._next[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to ``count`` tokens that followed when the text stood at its last n-gram before."""
        for length in _LENGTHS if count > 0 else ():
            start = self._next.get(tuple(self._tokens[-length:]))
            if start is not None:
                return self._tokens[start : start + count]
        return []


def check_trimmable(prompt_cache: PromptCache, few: bool = False) -> None:
    """Check that a prompt cache can give back any of its last tokens, now and later.

    Args:
        prompt_cache: any caches.
        few: whether the last ``MAX_DRAFT`` tokens are enough, which a ``TurboQuantKVCache`` with a
            window can give back. mlx_lm's own speculation asks for any.

    Raises:
        ValueError: it cannot; the message names the caches.
    """
    every = [part for cache in prompt_cache for part in parts(cache)]
    unfit = {type(cache).__name__ for cache in every if not _gives_back(cache, few)}
    if unfit:
        raise ValueError(
            "speculative decoding gives back tokens that the model refuses, which "
            f"{', '.join(sorted(unfit))} cannot do for this model or with max_kv_size"
        )


def _gives_back(cache: object, few: bool) -> bool:
    if isinstance(cache, TurboQuantKVCache):
        return cache.sequences.max_kv_size is None and (few or not cache.sequences.window)
    return isinstance(cache, (host.KVCache, host.QuantizedKVCache))


def lookup_generate_step(
    prompt: mx.array,
    model: nn.Module,
    prompt_cache: PromptCache,
    *,
    num_draft_tokens: int = MAX_DRAFT,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Progress = lambda done, total: None,
) -> Generator[tuple[int, mx.array, bool]]:
    """Generate tokens, as ``mlx_lm.generate.speculative_generate_step`` does.

    Args:
        prompt: token ids, at least one.
        model: a model that mlx_lm has loaded.
        prompt_cache: what ``make_prompt_cache(model)`` made. At any end it holds all tokens but
            the last one that was handed out.
        num_draft_tokens: tokens drafted at a time, ``MAX_DRAFT`` at most.
        max_tokens: tokens to generate.
        sampler: chooses tokens from log-probabilities ``(L, vocabulary)``; None: the likeliest.
        prefill_step_size: prompt tokens processed at a time.
        prompt_progress_callback: called with prompt tokens processed, and in all.

    Yields:
        A token, its log-probabilities, and whether it was drafted.

    Raises:
        ValueError: ``num_draft_tokens`` is out of range, or a cache cannot be trimmed.
    """
    if not 1 <= num_draft_tokens <= MAX_DRAFT:
        raise ValueError(f"{num_draft_tokens} draft tokens: 1 to {MAX_DRAFT} can be verified")
    check_trimmable(prompt_cache, few=True)
    sampler = sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))
    tokens, seen, done = _integers(prompt), Seen(), 0
    for token in tokens:
        seen.add(token)
    while len(tokens) > 1:  # the chunks of mlx_lm's generate_step
        chunk = tokens[: min(prefill_step_size, len(tokens) - 1)]
        with mx.stream(generation_stream):
            model(mx.array([chunk]), cache=prompt_cache)
            mx.eval([c.state for c in prompt_cache])
        tokens = tokens[len(chunk) :]
        prompt_progress_callback(prompt.size - len(tokens), prompt.size)
        mx.clear_cache()
    last = tokens[0]
    while done < max_tokens:
        draft = seen.draft(min(num_draft_tokens, max_tokens - done - 1))
        with mx.stream(generation_stream):
            logits = model(mx.array([[last, *draft]]), cache=prompt_cache)[0]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = _integers(sampler(logprobs))
        pairs = enumerate(zip(draft, chosen, strict=False))
        accepted = next((i for i, (ours, its) in pairs if ours != its), len(draft))
        handed = 0
        try:
            for handed in range(accepted + 1):
                last = chosen[handed]
                seen.add(last)
                yield last, logprobs[handed], handed < accepted
        finally:
            for cache in prompt_cache:
                cache.trim(len(draft) - handed)
        done += accepted + 1


def _integers(x: mx.array) -> list[int]:
    return cast(list[int], x.tolist())


def stream_lookup(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    max_tokens: int = 256,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generate text, as ``mlx_lm.stream_generate`` does; ``options`` are those of the tokens."""
    detokenizer, start, prompt_tps = tokenizer.detokenizer, time.perf_counter(), 0.0
    steps = lookup_generate_step(mx.array(prompt), model, max_tokens=max_tokens, **options)
    streams: list[Any] = [generation_stream]  # of another class than wired_limit says
    with wired_limit(model, streams), closing(steps):
        for count, (token, logprobs, drafted) in enumerate(steps, start=1):
            now = time.perf_counter()
            if count == 1:
                prompt_tps, start = len(prompt) / (now - start), now
            stopped = token in tokenizer.eos_token_ids
            last = stopped or count == max_tokens
            if not stopped:
                detokenizer.add_token(token)
            if last:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=logprobs,
                from_draft=drafted,
                prompt_tokens=len(prompt),
                prompt_tps=prompt_tps,
                generation_tokens=count,
                generation_tps=count / max(now - start, 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=("stop" if stopped else "length") if last else None,
            )
            if last:
                return
