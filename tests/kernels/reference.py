"""Attention over pages in float64, straight from what ``codec.decode`` gives."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_metal_tq import codec
from vllm_metal_tq.centre import Centre
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.kernels.decode import TAIL, Options
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import PagePool
from vllm_metal_tq.rotation import unrotate


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


@dataclass(frozen=True)
class Centring:
    """What of a random ``Centre`` and of its use matters.

    Attributes:
        mu: length of mean keys, and
        mean: of mean values, relative to those of keys and values.
        base: of the rotary embedding's angles.
        turned: elements that it turns; all of them if None.
        neighbours: whether elements next to each other are a pair, or those half of them apart.
        shift: positions of each sequence less indices.
        flagged: share of the tokens whose mean was left out.
    """

    mu: float = 1.0
    mean: float = 0.1
    base: float = 1e6
    turned: int | None = None
    neighbours: bool = False
    shift: tuple[int, ...] = (0,)
    flagged: float = 0.7

    def centre(self, rng, num_kv_heads: int, head_dim: int) -> Centre:
        turned = self.turned or head_dim
        elements = np.arange(turned).reshape((-1, 2) if self.neighbours else (2, -1))
        elements = elements if self.neighbours else elements.T
        angles = self.base ** (-np.arange(turned // 2) / (turned // 2))
        steps = np.round(angles / (2 * np.pi) * 2**32)
        rest = np.arange(turned, head_dim).reshape(-1, 2)
        pairs = np.concatenate([elements, rest])
        steps = np.concatenate([steps, np.zeros(len(rest))])
        smoothing = np.ones((num_kv_heads, head_dim))
        smoothing[:, pairs] = np.exp(0.3 * rng.normal(size=(num_kv_heads, head_dim // 2, 1)))
        # A few pairs hold most of a mean, as in models.
        mu = rng.normal(size=(num_kv_heads, head_dim)) * np.exp(rng.normal(size=head_dim))
        mu *= self.mu * head_dim**0.5 / np.linalg.norm(mu, axis=1, keepdims=True)
        mean = self.mean * rng.normal(size=(num_kv_heads, head_dim))
        return Centre(
            np.column_stack([pairs, steps]).astype(np.uint32),
            *(mx.array(x.astype(np.float32)) for x in (mu, smoothing, mean)),
        )


def turned_means(centre: Centre, positions: np.ndarray) -> np.ndarray:
    """R_j mu in float64, by its definition: ``(num_kv_heads, positions, head_dim)``."""
    first, second, steps = centre.pairs.astype(np.uint64).T
    phases = (positions.astype(np.uint64)[:, None] * steps) % 2**32
    cos, sin = (f(phases * (2 * np.pi / 2**32)) for f in (np.cos, np.sin))
    mu = float64(centre.mu)[:, None]
    turned = np.empty((len(mu), len(positions), mu.shape[2]))
    turned[..., first] = mu[..., first] * cos - mu[..., second] * sin
    turned[..., second] = mu[..., second] * cos + mu[..., first] * sin
    return turned


class Case:
    """Sequences of random keys and values in shuffled pages, and queries that attend to them."""

    def __init__(
        self,
        lengths,
        *,
        heads=(4, 2),
        rows=1,
        head_dim=128,
        widths=(4, 4),
        block_size=16,
        tail=0,
        dtype=mx.float16,
        sinks=False,
        loud=1.0,
        centring=None,
        seed=0,
        **options,
    ):
        """Make it.

        Args:
            lengths: tokens of each sequence in pages; ``tail`` more lie in a ring.
            heads: query heads and KV heads.
            rows: query rows.
            head_dim: size of a head.
            widths: of keys and values.
            block_size: tokens of a page.
            tail: see ``lengths``.
            dtype: of queries and tail.
            sinks: whether there are any.
            loud: size of the queries.
            centring: how keys and values are centred, or None.
            seed: of random numbers.
            options: of ``Options``.
        """
        rng = np.random.default_rng(seed)
        self.layout = PageLayout(TurboQuantConfig(*widths, block_size), head_dim)
        num_heads, num_kv_heads = heads
        per_sequence = [-(-length // block_size) for length in lengths]
        shuffled = rng.permutation(sum(per_sequence) + 2)
        self.pool = PagePool(self.layout, num_kv_heads)
        # What no token has written may be anything, NaN among it.
        junk = rng.integers(0, 256, (len(shuffled), num_kv_heads, self.layout.page_bytes))
        self.pool.adopt(mx.array(junk.astype(np.uint8)), list(range(len(shuffled))))
        table = np.zeros((len(lengths), max(1, *per_sequence)), np.int32)
        for i, (length, count) in enumerate(zip(lengths, per_sequence, strict=True)):
            table[i, :count], shuffled = shuffled[:count], shuffled[count:]
            if length:
                keys, values = rng.normal(size=(2, num_kv_heads, length, head_dim))
                keys[:, 2::7] = values[:, 3::7] = 0  # their scales are 0, or -0 with a flag
                stored = (mx.array(x.astype(np.float32)) for x in (keys, values))
                rows_ = np.array(codec.encode(*stored, self.layout))
                if centring:
                    scales = rows_[..., -4:].view(np.uint16)
                    scales |= (rng.random(scales.shape) < centring.flagged).astype(np.uint16) << 15
                place = np.arange(length)
                slots = table[i, place // block_size] * block_size + place % block_size
                self.pool.write((tuple(slots.tolist()),), mx.array(rows_)[None])
        self.paged = list(lengths)
        self.block_table = mx.array(table)
        self.centre = centring and centring.centre(rng, num_kv_heads, head_dim)
        self.shift = np.resize(centring.shift if centring else 0, len(lengths)).tolist()
        self.lengths = mx.array(
            [[n, n + tail, shift] for n, shift in zip(lengths, self.shift, strict=True)], mx.int32
        )

        def random(*shape, size=1.0):
            return mx.array((rng.normal(size=shape) * size).astype(np.float32)).astype(dtype)

        batch = len(lengths)
        self.queries = random(batch, num_heads, rows, head_dim, size=loud)
        self.tail = (
            tuple(random(batch, num_kv_heads, TAIL, head_dim) for _ in range(2)) if tail else None
        )
        self.sinks = mx.array(rng.normal(size=num_heads).astype(np.float32)) if sinks else None
        self.options = Options(head_dim**-0.5, **options)

    def attended(self, decode, **more) -> mx.array:
        """What ``decode`` makes of it."""
        return decode(
            self.queries,
            self.pool.pages,
            self.block_table,
            self.lengths,
            self.layout,
            self.options,
            tail=self.tail,
            sinks=self.sinks,
            centre=self.centre,
            **{"max_tokens": max(self.paged)} | more,
        )

    def expected(self) -> np.ndarray:
        return np.stack([self._sequence(i) for i in range(len(self.paged))])

    def error(self, decode, **more) -> float:
        """Error of ``decode`` relative to the expected attention, over all of it."""
        want = self.expected()
        got = float64(self.attended(decode, **more))
        return np.linalg.norm(got - want) / np.linalg.norm(want)

    def _sequence(self, i: int) -> np.ndarray:
        keys, values = self.tokens(i)
        queries = float64(self.queries[i])
        heads, rows, _ = queries.shape
        keys, values = (np.repeat(x, heads // len(x), axis=0) for x in (keys, values))
        logits = queries @ keys.swapaxes(1, 2) * self.options.scale
        if self.options.softcap:
            logits = self.options.softcap * np.tanh(logits / self.options.softcap)
        distance = np.arange(keys.shape[1]) - (keys.shape[1] - rows + np.arange(rows)[:, None])
        seen = distance <= 0
        if self.options.window:
            seen &= distance > -self.options.window
        logits[:, ~seen] = -np.inf
        extra = np.full((heads, rows, 1), -np.inf)
        if self.sinks is not None:
            extra[...] = float64(self.sinks)[:, None, None]
        logits = np.concatenate([logits, extra], axis=-1)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights[..., :-1] @ values

    def tokens(self, i: int):
        """Keys and values of a sequence, rotated back: ``(num_kv_heads, tokens, head_dim)``."""
        blocks = self.block_table[i, : max(1, -(-self.paged[i] // self.layout.config.block_size))]
        pages = self.pool.pages[blocks].swapaxes(0, 1)
        parts = [
            float64(unrotate(x.flatten(1, 2), self.layout.head_dim))[:, : self.paged[i]]
            for x in codec.decode(pages, self.layout)
        ]
        if self.centre:
            positions = self.shift[i] + np.arange(self.paged[i])
            means = turned_means(self.centre, positions), float64(self.centre.value_mean)[:, None]
            flags = (
                np.array(x).reshape(len(x), -1, 1)[:, : self.paged[i]]
                for x in codec.flags(pages, self.layout)
            )
            parts[0] /= float64(self.centre.smoothing)[:, None]
            parts = [x + flag * mean for x, flag, mean in zip(parts, flags, means, strict=True)]
        if self.tail is not None:
            slots = np.arange(*self.lengths[i, :2].tolist()) % TAIL
            tails = [float64(x[i])[:, slots] for x in self.tail]
            parts = [np.concatenate(pair, axis=1) for pair in zip(parts, tails, strict=True)]
        return parts
