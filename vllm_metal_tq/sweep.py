"""Many ways to compress a cache, measured on one text at equal conditions.

Windows and scores are those of ``evaluate``; the uncompressed cache runs once for all methods.
What is kept of its run are the logits of one window's scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache as make_dense_cache

from .calibration import Calibration
from .config import TurboQuantConfig
from .evaluate import CHUNK, Quality, _compare
from .integrations.mlx_lm import TurboQuantKVCache, make_prompt_cache
from .tail import TAIL

PAIRS = (
    *((2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4), (5, 4), (5, 5), (6, 4), (6, 5), (6, 6)),
    *((8, 3), (8, 4), (8, 5), (8, 6), (8, 8)),
)
"""(key bits, value bits) of a sweep: the presets, and what lies between them."""

OURS = "vllm-metal-tq"
KEPT_BITS = 16  # an element of the tail, in bf16


@dataclass(frozen=True)
class Method:
    """A way to store the cache.

    Attributes:
        family: the name that its points share in a plot.
        name: what a table calls it.
        bits: bits of an element of K or V in a full window, everything that is stored included.
        caches: from a model to its prompt cache, under decode conditions: a query sees its own
            token as it came, and older ones as decoding token by token would show them.
    """

    family: str
    name: str
    bits: float
    caches: Callable[[nn.Module], list]


@dataclass(frozen=True)
class Point:
    """What was measured of a method; the quality's ``bits_per_element`` are the method's."""

    family: str
    name: str
    quality: Quality

    @property
    def bits(self) -> float:
        """Bits of an element of K or V in a full window, everything that is stored included."""
        return self.quality.bits_per_element

    @property
    def kl(self) -> float:
        """Mean KL divergence from the uncompressed run, in nats."""
        return self.quality.kl_mean

    def fields(self) -> dict:
        """The point as JSON states it."""
        figures = asdict(self.quality) | {"dppl_percent": self.quality.dppl_percent}
        return {"family": self.family, "name": self.name} | figures


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

    def caches(model: nn.Module) -> list:
        made = make_prompt_cache(model, config, calibration=calibration)
        for cache in _ours(made):
            cache.raw_window = TAIL if tail else 1
        return made

    layouts = [cache.layout for cache in _ours(caches(model))]
    if not layouts:
        raise ValueError("no layer of this model can be compressed")
    pages = float(np.mean([layout.bits_per_element for layout in layouts]))
    if not tail:
        return Method(OURS, f"{config.label} without tail", pages, caches)
    return Method(OURS, config.label, pages + KEPT_BITS * min(TAIL / window, 1), caches)


def _ours(caches: list) -> list[TurboQuantKVCache]:
    return [cache for cache in caches if isinstance(cache, TurboQuantKVCache)]


def measure(
    model: nn.Module,
    token_ids: list[int],
    methods: Sequence[Method],
    *,
    window: int = 1024,
    tokens: int = 1024,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Measure every method on a text.

    Args:
        model: a model that mlx_lm has loaded.
        token_ids: the text.
        methods: what to measure.
        window: tokens of a window; the second half of it is scored.
        tokens: positions to score; fewer are where the text is too short for them.
        progress: called with tokens done and tokens in all, those of every method.

    Raises:
        ValueError: ``window`` or ``tokens`` is out of range, or the text is shorter than a window.
    """
    pieces = list(_pieces(token_ids, window, tokens))
    first, done = window // 2, 0
    total = sum(len(piece) - 1 for piece in pieces) * (1 + len(methods))

    def logits(piece: list[int], caches: list) -> Iterator[mx.array]:
        """Logits ``(n, vocab)`` of each chunk's scored positions."""
        nonlocal done
        for start in range(0, len(piece) - 1, CHUNK):
            chunk = piece[start : start + CHUNK][: len(piece) - 1 - start]
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
        Point(method.family, method.name, _quality(np.concatenate(found, axis=1), method.bits))
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


def _quality(scores: np.ndarray, bits: float) -> Quality:
    """Figures of ``(4, positions)``: both losses, KL divergence, agreement."""
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


# --- What points say --------------------------------------------------------------------------


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both bits and KL, by rising bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def best_within(points: Iterable[Point], bits: float) -> Point | None:
    """The point of least KL that takes at most so many bits, or None."""
    return min((p for p in points if p.bits <= bits), key=lambda point: point.kl, default=None)


def rows(points: Sequence[Point]) -> list[list[str]]:
    """A table's cells by rising bits: name, bits, KL twice, perplexity, top-1, on the frontier."""
    best = frontier(points)
    return [
        [
            point.name,
            f"{point.bits:.2f}",
            f"{point.kl:.5f}",
            f"{point.quality.kl_p99:.4f}",
            f"{point.quality.dppl_percent:+.2f} %",
            f"{100 * point.quality.top1:.1f} %",
            "yes" if point in best else "",
        ]
        for point in sorted(points, key=lambda point: (point.bits, point.kl))
    ]


def markdown(points: Sequence[Point]) -> str:
    """The same as a Markdown table."""
    lines = [
        "| cache | bits | KL mean | KL p99 | perplexity | top-1 | on the frontier |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in rows(points)),
    ]
    return "\n".join(lines) + "\n"


def why_not_draw() -> str | None:
    """What ``draw`` lacks, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "a plot needs matplotlib: pip install 'vllm-metal-tq[plot]'"
    return None


def draw(points: Sequence[Point], file: str, title: str) -> None:
    """Draw KL against bits, a line through each family's frontier; ours is the bold one.

    Raises:
        ValueError: matplotlib is missing.
    """
    if missing := why_not_draw():
        raise ValueError(missing)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for family in dict.fromkeys(point.family for point in points):
        members = [point for point in points if point.family == family]
        ours = family == OURS
        (line,) = axes.plot(
            [point.bits for point in frontier(members)],
            [point.kl for point in frontier(members)],
            linewidth=2.5 if ours else 1,
            color="black" if ours else None,
            zorder=3 if ours else 2,
        )
        axes.scatter(
            [point.bits for point in members],
            [point.kl for point in members],
            s=36 if ours else 16,
            color=line.get_color(),
            label=family,
            zorder=3 if ours else 2,
        )
        for point in frontier(members) if ours else ():
            axes.annotate(
                point.name,
                (point.bits, point.kl),
                xytext=(-4, -9),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
    axes.set(
        yscale="log",
        xlabel="bits of an element of K or V, everything included",
        ylabel="mean KL divergence from the uncompressed cache, nats",
        title=title,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=120)
