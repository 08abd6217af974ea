"""How much the compressed cache changes a model's predictions.

A text is cut into windows. Each window goes through the model twice, in the same chunks: with
mlx_lm's own cache and with the compressed one. The positions of a window's second half are
scored, so that every scored prediction rests on a long past. The compressed run sees exactly what
token-by-token decoding sees: the last ``TAIL`` tokens as they came, every older one through the
pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache as make_dense_cache

from .calibration import Calibration
from .config import TurboQuantConfig
from .integrations.mlx_lm import TurboQuantKVCache, make_prompt_cache
from .tail import TAIL

CHUNK = 128


@dataclass(frozen=True)
class Quality:
    """Predictions with the compressed cache against predictions with the uncompressed one.

    Attributes:
        ppl: perplexity with the compressed cache.
        ppl_reference: perplexity with the uncompressed cache.
        kl_mean: mean KL(reference || compressed) of the next-token distributions, in nats.
        kl_p99: its 99th percentile.
        top1: fraction of positions at which both name the same most likely token.
        bits_per_element: bits stored for an element of K or V, every overhead byte included.
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


def evaluate(
    model: nn.Module,
    token_ids: list[int],
    config: TurboQuantConfig,
    *,
    window: int = 1024,
    tokens: int = 1024,
    calibration: Calibration | None = None,
    raw_window: int = TAIL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Measure ``config`` on a text.

    Args:
        model: a model that mlx_lm has loaded.
        token_ids: the text.
        config: widths of the compressed cache.
        window: tokens of a window; the second half of it is scored.
        tokens: positions to score; fewer are where the text is too short for them.
        calibration: as ``make_prompt_cache`` takes it.
        raw_window: how many recent tokens a query sees as they came, itself included: 1 measures
            what the tail is good for, and more than ``TAIL`` are not to be had.
        progress: called with tokens done and tokens in all.

    Raises:
        ValueError: ``window`` or ``tokens`` is out of range, the text is shorter than a window,
            or no layer of the model can be compressed.
    """
    if window < 4 or tokens < 1:
        raise ValueError(f"window {window} must be at least 4 and tokens {tokens} at least 1")
    if len(token_ids) <= window:
        raise ValueError(
            f"the text has {len(token_ids)} tokens: a window of {window} needs {window + 1}"
        )
    windows = min(-(-tokens // (window - window // 2)), (len(token_ids) - 1) // window)
    scores, ours = [], []
    for i in range(windows):
        piece = token_ids[i * window : (i + 1) * window + 1]
        caches = make_prompt_cache(model, config, calibration=calibration)
        ours = [cache for cache in caches if isinstance(cache, TurboQuantKVCache)]
        if not ours:
            raise ValueError("no layer of this model can be compressed")
        for cache in ours:
            cache.raw_window = raw_window
        for done, score in _score_window(model, piece, make_dense_cache(model), caches):
            progress(i * window + done, windows * window)
            if score is not None:
                scores.append(score)
    nll_reference, nll, kl, same = np.concatenate(scores, axis=1)[:, :tokens]
    return Quality(
        ppl=float(np.exp(nll.mean())),
        ppl_reference=float(np.exp(nll_reference.mean())),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
        bits_per_element=float(np.mean([cache.layout.bits_per_element for cache in ours])),
        tokens=len(kl),
    )


def _score_window(model, piece: list[int], dense: list, compressed: list):
    """Yield (tokens done, scores ``(4, n)`` of the chunk's scored positions or None)."""
    length = len(piece) - 1
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        chunk = mx.array([piece[start:end]])
        reference, ours = model(chunk, cache=dense)[0], model(chunk, cache=compressed)[0]
        skip = max(length // 2 - start, 0)
        if skip >= end - start:
            mx.eval(reference, ours)
            yield end, None
            continue
        targets = mx.array(piece[start + 1 : end + 1])
        yield end, np.array(_compare(reference[skip:], ours[skip:], targets[skip:]))


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
