"""Decode speed of a whole model of random weights, with mlx_lm's caches and with ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from ..config import TurboQuantConfig
from ..layout import PageLayout
from . import caches, clock

_COMMON: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5}
MODEL_SHAPES = {
    "llama-3.2-1b": llama.ModelArgs(
        **_COMMON,
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": llama.ModelArgs(
        **_COMMON,
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    ),
    "demo": llama.ModelArgs(
        **_COMMON,
        hidden_size=576,
        num_hidden_layers=30,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}
"""Name -> configuration; ``demo`` is SmolLM2-135M's."""

CHUNK = 8192  # tokens put into a cache at a time
MEMORY_SHARE = 0.9  # of the device's memory may be used


def random_model(name: str) -> llama.Model:
    """A model of random weights, quantised to 4 bits in groups of 64."""
    model = llama.Model(MODEL_SHAPES[name])
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)
    for layer in model.layers:  # one by one, since they are float32 first
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    return model


class GenerateBench:
    """One model, and the caches to compare.

    Args:
        name: one of ``MODEL_SHAPES``.
        config: widths of our cache.

    Attributes:
        makers: name -> what makes the cache of every layer.
    """

    def __init__(self, name: str, config: TurboQuantConfig):
        args = MODEL_SHAPES[name]
        self.model = random_model(name)
        self.kv_heads: int = args.num_key_value_heads or args.num_attention_heads
        self.head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
        self.weight_bytes = sum(x.nbytes for x in caches.arrays(self.model.parameters()))
        self.makers = {x: caches.maker(x, config) for x in (*caches.BASELINES, config.label)}
        self._bits = {x: caches.bits_per_element(x) for x in caches.BASELINES}
        self._bits[config.label] = PageLayout(config, self.head_dim).bits_per_element

    def run(self, cache: str, batch: int, context: int) -> dict[str, Any]:
        """Time decoding with one of ``makers`` at one batch size and context.

        Returns:
            ``cache``, ``batch``, ``context``; ``tokens_per_s`` of all sequences together,
            ``peak_bytes`` while decoding, ``kv_bytes`` allocated; ``skipped``, the reason where
            there are no figures.
        """
        case = {"cache": cache, "batch": batch, "context": context}
        figures = dict.fromkeys(("tokens_per_s", "peak_bytes", "kv_bytes"))
        skipped = self._too_large(cache, batch, context)
        if skipped is None:
            try:
                figures = self._measure(self.makers[cache](self.model), batch, context)
            except (ValueError, RuntimeError) as e:
                skipped = str(e).split("\n")[0]
        clock.release()
        return {**case, **figures, "skipped": skipped}

    def _too_large(self, cache: str, batch: int, context: int) -> str | None:
        elements = 2 * batch * context * self.kv_heads * self.head_dim * len(self.model.layers)
        needed = self.weight_bytes + elements * self._bits[cache] / 8
        there = clock.device_bytes()
        if needed <= MEMORY_SHARE * there:
            return None
        return f"needs {needed / 1e9:.0f} GB of the device's {there / 1e9:.0f} GB"

    def _measure(self, made: list[Any], batch: int, context: int) -> dict[str, float]:
        self._fill(made, batch, context)
        clock.release()
        mx.reset_peak_memory()
        _, seconds = clock.stream_times(self._decode(made, batch))
        return {
            "tokens_per_s": batch / seconds,
            "peak_bytes": mx.get_peak_memory(),
            "kv_bytes": sum(cache.nbytes for cache in made),
        }

    def _fill(self, made: list[Any], batch: int, context: int) -> None:
        """Put random keys and values into every layer, in place of a prefill."""
        size = (batch, self.kv_heads, min(context, CHUNK), self.head_dim)
        keys, values = (mx.random.normal(size, dtype=mx.bfloat16) for _ in range(2))
        for cache in made:
            for start in range(0, context, CHUNK):
                chunk = slice(0, min(CHUNK, context - start))
                cache.update_and_fetch(keys[:, :, chunk], values[:, :, chunk])
                mx.eval(caches.arrays(cache.state))

    def _decode(self, made: list[Any], batch: int) -> Iterator[None]:
        """Decode greedily, a step ahead of the tokens that are waited for, as mlx_lm does."""
        tokens = self._next(made, mx.zeros((batch, 1), mx.int32))
        for _ in range(clock.STREAMED):
            ahead = self._next(made, tokens)
            mx.eval(tokens)
            yield
            tokens = ahead
        mx.eval(tokens)

    def _next(self, made: list[Any], tokens: mx.array) -> mx.array:
        logits = self.model(tokens, cache=made)
        chosen = mx.argmax(logits[:, -1:], axis=-1)
        mx.async_eval(chosen)
        return chosen
