"""Greedy continuations under the conditions of decoding."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from .evaluate import CHUNK
from .types import PromptCache, Tokenizer


def complete(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: list[int],
    caches: PromptCache,
    max_tokens: int,
    stop: str | None = None,
) -> str:
    """The text that greedy decoding puts after ``prompt``.

    The prompt passes in chunks. For its tokens to see a compressed cache as decoding would,
    ``raw_window`` of the caches must be set, as ``evaluate.compressed`` does.

    Args:
        model: a model that mlx_lm has loaded.
        tokenizer: its tokenizer.
        prompt: token ids.
        caches: an empty prompt cache.
        max_tokens: at most so many tokens.
        stop: a text that ends the answer and is not part of it; an end-of-sequence token also does.
    """
    text, tokens = "", []
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=max_tokens,
        prompt_cache=caches,
        prefill_step_size=CHUNK,
    )
    for token, _ in steps:
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(int(token))
        text = tokenizer.decode(tokens)
        if stop and stop in text:
            return text[: text.index(stop)]
    return text
