"""How much compressed caches change a model's predictions.

A text is cut into windows. Each window goes through the model in the same chunks with mlx_lm's
own cache and with every cache that is measured. The positions of a window's second half are
scored, so that every scored prediction rests on a long past. What is kept of the uncompressed run
are the logits of one window's scored positions.

Measured caches work under the conditions of decoding: a query sees what it would when decoding
token by token, recent tokens as they came where the cache keeps them so, and all others through
the pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache as make_dense_cache

from .calibration import Calibration
from .config import TurboQuantConfig
from .integrations.mlx_lm import make_prompt_cache
from .integrations.mlx_lm.fetched import FetchedKVCache
from .integrations.mlx_lm.parts import all_compressed
from .tail import TAIL
from .types import MakeCaches, Progress, PromptCache

CHUNK = 128
KEPT_BITS = 16  # an element of the tail, in bf16


@dataclass(frozen=True)
class Quality:
    """Predictions with a compressed cache against predictions with the uncompressed one.

    Attributes:
        ppl: perplexity with the compressed cache.
        ppl_reference: perplexity with the uncompressed cache.
        kl_mean: mean KL(reference || compressed) of the next-token distributions, in nats.
        kl_p99: its 99th percentile.
        top1: fraction of positions at which both name the same most likely token.
        bits_per_element: bits stored for an element of K or V, scales included. ``evaluate``
            counts pages alone, which is the limit for long contexts; ``measure`` also spreads
            what else is stored over the tokens of a window.
        tokens: positions scored.
    """

    ppl: float
    ppl_reference: float
    kl_mean: float
    kl_p99: float
    top1: float
    bits_per_element: float
    tokens: int

    @property
    def dppl_percent(self) -> float:
        """How much higher the perplexity is than with the uncompressed cache, in percent."""
        return 100 * (self.ppl / self.ppl_reference - 1)


@dataclass(frozen=True)
class Method:
    """A way to store the cache.

    Attributes:
        family: the name that its points share in a plot.
        name: what a table calls it.
        bits: bits of an element of K or V in a full window, everything that is stored included.
        caches: from a model to its prompt cache, under the conditions of decoding.
    """

    family: str
    name: str
    bits: float
    caches: MakeCaches


OURS = "vllm-metal-tq"


def compressed(
    model: nn.Module,
    config: TurboQuantConfig,
    window: int,
    *,
    calibration: Calibration | None = None,
    tail: bool = True,
) -> Method:
    """Our own cache as a method.

    Args:
        model: the model that will be measured; its head dims decide the bits.
        config: widths.
        window: tokens of a window, over which the tail's bytes are spread.
        calibration: as ``make_prompt_cache`` takes it.
        tail: whether the last ``TAIL`` tokens are seen as they came, and their bytes counted.

    Raises:
        ValueError: no layer of the model can be compressed.
    """

    def caches(model: nn.Module) -> PromptCache:
        made = make_prompt_cache(model, config, calibration=calibration)
        return as_decoding(made, TAIL if tail else 1)

    pages = _page_bits(caches(model))
    if not tail:
        return Method(OURS, f"{config.label} without tail", pages, caches)
    return Method(OURS, config.label, pages + KEPT_BITS * min(TAIL / window, 1), caches)


def as_decoding(caches: PromptCache, raw_window: int = TAIL) -> PromptCache:
    """``caches``, of which ours now show a chunk's tokens what decoding them would have shown."""
    for cache in all_compressed(caches):
        if isinstance(cache, FetchedKVCache):
            raise ValueError(
                "this model attends with code of its own, to which a chunk cannot show what "
                "decoding would: its quality cannot be measured"
            )
        cache.sequences.raw_window = raw_window
    return caches


def _page_bits(caches: PromptCache) -> float:
    found = [cache.layout.bits_per_element for cache in all_compressed(caches)]
    if not found:
        raise ValueError("no layer of this model can be compressed")
    return float(np.mean(found))


def evaluate(
    model: nn.Module,
    token_ids: list[int],
    config: TurboQuantConfig,
    *,
    window: int = 1024,
    tokens: int = 1024,
    calibration: Calibration | None = None,
    tail: bool = True,
    progress: Progress = lambda done, total: None,
) -> Quality:
    """Measure ``config`` on a text; the bits are those of the pages.

    Args:
        model: a model that mlx_lm has loaded.
        token_ids: the text.
        config: widths of the compressed cache.
        window: tokens of a window; the second half of it is scored.
        tokens: positions to score; fewer are where the text is too short for them.
        calibration: as ``make_prompt_cache`` takes it.
        tail: whether the last ``TAIL`` tokens are seen as they came.
        progress: called with tokens done and tokens in all, of both caches.

    Raises:
        ValueError: ``window`` or ``tokens`` is out of range, the text is shorter than a window,
            or no layer of the model can be compressed.
    """
    method = compressed(model, config, window, calibration=calibration, tail=tail)
    (quality,) = measure(
        model, token_ids, [method], window=window, tokens=tokens, progress=progress
    )
    return replace(quality, bits_per_element=_page_bits(method.caches(model)))


def measure(
    model: nn.Module,
    token_ids: list[int],
    methods: Sequence[Method],
    *,
    window: int = 1024,
    tokens: int = 1024,
    progress: Progress = lambda done, total: None,
) -> list[Quality]:
    """Measure every method on a text.

    Args:
        model: a model that mlx_lm has loaded.
        token_ids: the text.
        methods: what to measure.
        window: tokens of a window; the second half of it is scored.
        tokens: positions to score; fewer are where the text is too short for them.
        progress: called with tokens done and tokens in all, those of every method.

    Returns:
        What was found of each method, with the method's bits.

    Raises:
        ValueError: ``window`` or ``tokens`` is out of range, or the text is shorter than a window.
    """
    pieces = list(_pieces(token_ids, window, tokens))
    first, done = window // 2, 0
    total = sum(len(piece) - 1 for piece in pieces) * (1 + len(methods))

    def logits(piece: list[int], caches: PromptCache) -> Iterator[mx.array]:
        """Logits ``(n, vocab)`` of each chunk's scored positions."""
        nonlocal done
        inputs = piece[:-1]
        for start in range(0, len(inputs), CHUNK):
            chunk = inputs[start : start + CHUNK]
            output = model(mx.array([chunk]), cache=caches)[0]
            mx.eval(output)
            done += len(chunk)
            progress(done, total)
            if start + len(chunk) > first:
                yield output[max(first - start, 0) :]

    scores: list[list[np.ndarray]] = [[] for _ in methods]
    for piece in pieces:
        reference = list(logits(piece, make_dense_cache(model)))
        for method, found in zip(methods, scores, strict=True):
            at = first + 1
            for theirs, ours in zip(reference, logits(piece, method.caches(model)), strict=True):
                targets = mx.array(piece[at : at + len(ours)])
                found.append(np.array(_compare(theirs, ours, targets)))
                at += len(ours)
    return [
        _quality(np.concatenate(found, axis=1), method.bits)
        for method, found in zip(methods, scores, strict=True)
    ]


def _pieces(token_ids: list[int], window: int, tokens: int) -> Iterator[list[int]]:
    """The windows' tokens and one target more; the last window ends where enough are scored."""
    if window < 4 or tokens < 1:
        raise ValueError(f"window {window} must be at least 4 and tokens {tokens} at least 1")
    if len(token_ids) <= window:
        raise ValueError(
            f"the text has {len(token_ids)} tokens: a window of {window} needs {window + 1}"
        )
    scored = window - window // 2
    windows = min(-(-tokens // scored), (len(token_ids) - 1) // window)
    for i in range(windows):
        length = window // 2 + min(scored, tokens - i * scored)
        yield token_ids[i * window : i * window + length + 1]


def _compare(reference: mx.array, ours: mx.array, targets: mx.array) -> mx.array:
    """Both losses, KL divergence and top-1 agreement: ``(4, n)`` from logits ``(n, vocab)``."""
    log_p, log_q = (
        logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for logits in (reference.astype(mx.float32), ours.astype(mx.float32))
    )
    nll_p, nll_q = (-mx.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (log_p, log_q))
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = mx.argmax(log_p, axis=-1) == mx.argmax(log_q, axis=-1)
    return mx.stack([nll_p, nll_q, kl, same.astype(mx.float32)])


def _quality(scores: np.ndarray, bits: float) -> Quality:
    """Figures of ``(4, positions)``, as ``_compare`` gives them."""
    nll_reference, nll, kl, same = scores
    return Quality(
        ppl=float(np.exp(nll.mean())),
        ppl_reference=float(np.exp(nll_reference.mean())),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
        bits_per_element=bits,
        tokens=len(kl),
    )
