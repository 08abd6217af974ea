"""Attention over pages in float64, straight from what ``codec.decode`` gives."""

import mlx.core as mx
import numpy as np

from vllm_metal_tq import codec
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.kernels.decode import TAIL, Options
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.pages import PagePool
from vllm_metal_tq.rotation import unrotate


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


class Case:
    """Sequences of random keys and values in shuffled pages, and queries that attend to them."""

    def __init__(
        self,
        lengths,
        *,
        heads=(4, 2),
        rows=1,
        head_dim=128,
        bits=(4, 4),
        block_size=16,
        tail=0,
        dtype=mx.float16,
        sinks=False,
        loud=1.0,
        seed=0,
        **options,
    ):
        """``lengths``: tokens of each sequence in pages; ``tail`` more lie in a ring."""
        rng = np.random.default_rng(seed)
        self.layout = PageLayout(TurboQuantConfig(*bits, block_size), head_dim)
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
                keys, values = (
                    mx.array(rng.normal(size=(num_kv_heads, length, head_dim)).astype(np.float32))
                    for _ in range(2)
                )
                place = np.arange(length)
                slots = table[i, place // block_size] * block_size + place % block_size
                self.pool.write(slots, codec.encode(keys, values, self.layout))
        self.paged = list(lengths)
        self.block_table = mx.array(table)
        self.lengths = mx.array([[n, n + tail, 0] for n in lengths], dtype=mx.int32)

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
            max_tokens=max(self.paged),
            **more,
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
        if self.tail is not None:
            slots = np.arange(*self.lengths[i, :2].tolist()) % TAIL
            tails = [float64(x[i])[:, slots] for x in self.tail]
            parts = [np.concatenate(pair, axis=1) for pair in zip(parts, tails, strict=True)]
        return parts
