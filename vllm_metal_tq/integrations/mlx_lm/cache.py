"""The compressed cache of one layer, with the methods that mlx_lm expects of a cache."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm.models.cache as host

from ... import attention, dispatch
from ...centre import Centre, tiled
from ...config import TurboQuantConfig
from ...layout import PageLayout
from ...pages import BlockTable, PagePool
from ...tail import TAIL, Tail

STATE_VERSION = 2
FEW = 8  # tokens of a chunk that decoding kernels take


class TurboQuantKVCache(host._BaseCache):
    """The keys and values of one layer, compressed in pages.

    It holds one sequence, or a batch of sequences that take every step together: to the pages
    these are one sequence with more KV heads.

    ``update_and_fetch`` stores a chunk and hands it back as it came. The attention that follows
    (see ``hook``) sees recent tokens as they came and everything older through the pages: for a
    chunk of up to ``FEW`` tokens the last ``TAIL``, the chunk among them; for a longer one the
    chunk and ``TAIL`` before it.

    Args:
        config: widths and block size.
        head_dim: elements of a key and of a value.
        num_kv_heads: KV heads of the layer.
        max_kv_size: when more are stored, the oldest blocks but the first are dropped before the
            next chunk. None: no limit.
        raw_window: for measuring quality. When set, each query sees ``raw_window`` tokens, itself
            included, as they came, and all others through the pages: with ``TAIL`` what decoding
            token by token sees, with 1 what it would see without the tail.
        centre: calibration of the layer, or None.

    Attributes:
        offset: tokens seen, which is the position of the next one.
    """

    def __init__(
        self,
        config: TurboQuantConfig,
        head_dim: int,
        num_kv_heads: int,
        max_kv_size: int | None = None,
        raw_window: int | None = None,
        centre: Centre | None = None,
    ):
        least = 2 * config.block_size
        if max_kv_size is not None and max_kv_size < least:
            raise ValueError(f"max_kv_size {max_kv_size} is too few: at least {least} (two blocks)")
        self.config = config
        self.max_kv_size = max_kv_size
        self.raw_window = raw_window
        self.centre = centre
        self.offset = 0
        self.tail = Tail()
        self._before: tuple[mx.array, ...] = ()  # the tail that a long chunk sees before itself
        self.layout = PageLayout(config, head_dim)
        self.pool = PagePool(self.layout, num_kv_heads)
        self.table = BlockTable(self.pool)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store a chunk, ``(B, num_kv_heads, L, head_dim)`` each, and return it as it came.

        Raises:
            ValueError: the shapes do not fit, or an element cannot be encoded; nothing is stored.
                Layers before this one have stored the chunk: trim them by its length to go on.
        """
        if not self.pool.num_blocks and keys.shape[1:2] == (self.pool.num_kv_heads,):
            # The first chunk says how many sequences there are.
            self.pool = PagePool(self.layout, keys.shape[0] * keys.shape[1])
            self.table = BlockTable(self.pool)
            self.centre = self.centre and tiled(self.centre, keys.shape[0])
        if keys.ndim != 4 or keys.shape[0] * keys.shape[1] != self.pool.num_kv_heads:
            raise ValueError(
                f"keys {keys.shape} do not fit: (B, num_kv_heads, L, head_dim) with "
                f"{self.pool.num_kv_heads} KV heads in all is what this cache holds"
            )
        length = keys.shape[2]
        # The first block of a limited cache keeps its place when others are dropped, so that its
        # positions are no longer its indices plus a constant: its keys are stored uncentred.
        fixed = 0 if self.max_kv_size is None else self.config.block_size
        dispatch.store(
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self.table,
            self.tail,
            centre=self.centre,
            position=self.offset,
            uncentred=max(min(fixed - self.offset, length), 0),
            make_room=lambda: self._make_room(length),
        )
        self.offset += length
        return keys, values

    def _make_room(self, length: int) -> None:
        if self.max_kv_size is not None:
            self._evict(self._excess(length))
        before = self._sees_chunk(length)
        self._before = self.tail.ordered(self.table.num_tokens) if before else ()

    def _evict(self, count: int) -> None:
        before = self.table.num_tokens
        self.table.evict(count)
        if dropped := before - self.table.num_tokens:
            self.tail.shift(dropped, self.table.num_tokens - self.config.block_size)
        self.table.compact()  # gives back what a chunk beyond the limit took

    def _sees_chunk(self, length: int) -> bool:
        """Whether a chunk sees all of itself and the tail before it, not the last tokens alone."""
        return length > FEW or self.raw_window is not None

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: attention.Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend from a chunk that was just stored; see ``dispatch.attend``."""
        shape, batch, length = queries.shape, queries.shape[0], keys.shape[2]
        if batch > 1:
            if isinstance(mask, mx.array) and mask.ndim == 4:
                mask = mx.broadcast_to(mask, (*shape[:2], *mask.shape[2:])).flatten(0, 1)[None]
            sinks = None if sinks is None else mx.tile(sinks, batch)
            queries, keys, values = (x.flatten(0, 1)[None] for x in (queries, keys, values))
        options = {
            "scale": scale,
            "sinks": sinks,
            "centre": self.centre,
            "shift": self.offset - self.table.num_tokens,
        }
        if self._sees_chunk(length):
            attended = self._attend_chunk(queries, keys, values, mask, options)
        else:
            attended = dispatch.attend_last(queries, self.table, self.tail, mask=mask, **options)
        return attended.reshape(shape) if batch > 1 else attended

    def _attend_chunk(self, queries, keys, values, mask: attention.Mask, options: dict) -> mx.array:
        """Attend from a chunk that sees all of itself, and the tail before it, as they came."""
        length, num_tokens = keys.shape[2], self.table.num_tokens
        if self._before:
            before = (x[None] for x in self._before)
            recent = zip(before, (keys, values), strict=True)
            keys, values = (mx.concatenate(x, axis=2) for x in recent)
        self._before = ()
        past_length = num_tokens - keys.shape[2]
        if self.raw_window is not None:
            mask = attention.decode_mask(mask, length, num_tokens, keys.shape[2], self.raw_window)
            past_length = num_tokens
        return dispatch.attend(queries, keys, values, self.table, past_length, mask=mask, **options)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):  # noqa: N803 (mlx_lm's name)
        """The mask of the next chunk of ``N`` tokens, over what the cache will still hold."""
        stored = self.table.num_tokens - self.table.evictable(self._excess(N))
        return host.create_attention_mask(N, stored, return_array, window_size)

    def _excess(self, length: int) -> int:
        if self.max_kv_size is None:
            return 0
        return max(self.table.num_tokens + length - self.max_kv_size, 0)

    @property
    def bits(self) -> int:
        """Never there: mlx_lm's attention looks for it, so this reports a missing hook.

        Without the hook a query would see its own chunk and nothing else.
        """
        raise RuntimeError(
            "mlx_lm's attention cannot read a TurboQuantKVCache: make it with make_prompt_cache, "
            "which installs the hook"
        )

    def is_trimmable(self) -> bool:
        """Whether ``trim`` can restore an earlier state: not once tokens were dropped."""
        return self.offset == self.table.num_tokens

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, or all where there are fewer; returns how many."""
        n = max(min(self.table.num_tokens, n), 0)
        self.table.trim(n)
        self.tail.trim(n)
        self.offset -= n
        return n

    def size(self) -> int:
        """Tokens stored."""
        return self.table.num_tokens

    def empty(self) -> bool:
        """Whether no token was seen yet."""
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the tail's included."""
        return self.pool.pages.nbytes + self.tail.nbytes

    @property
    def nbytes_bf16(self) -> int:
        """Bytes that the same token slots take in bf16."""
        return self.pool.num_blocks * self.pool.num_kv_heads * self.layout.bf16_page_bytes

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The pages, one int32 array of numbers, the tail's two arrays, the centre's four.

        The last two parts are there where the cache has them.
        """
        header = [
            STATE_VERSION,
            self.config.k_bits,
            self.config.v_bits,
            self.config.block_size,
            self.layout.head_dim,
            self.pool.num_kv_heads,
            self.max_kv_size or 0,
            self.offset,
            self.table.num_tokens,
            self.tail.length,
            int(self.centre is not None),
        ]
        # An empty array cannot be saved, so an empty pool passes for one free block.
        pages = self.pool.pages
        if not self.pool.num_blocks:
            pages = mx.zeros((1, *pages.shape[1:]), mx.uint8)
        tail = self.tail.arrays if self.tail.length else ()
        centre = self.centre.arrays if self.centre else ()
        return pages, mx.array(header + self.table.blocks, mx.int32), *tail, *centre

    @state.setter
    def state(self, state: tuple[mx.array, ...]) -> None:
        self.__dict__.update(vars(self.from_state(state)))

    @classmethod
    def from_state(cls, state, meta_state=None) -> TurboQuantKVCache:
        """Rebuild a cache from ``state``; mlx_lm before 0.32 passes an empty ``meta_state``.

        Raises:
            ValueError: ``state`` is of another version, or its parts contradict each other.
        """
        pages, header, *rest = state
        version, *numbers = header.tolist()
        if version != STATE_VERSION:
            raise ValueError(f"state version {version} is unknown: {STATE_VERSION} can be read")
        k_bits, v_bits, block_size, head_dim, num_kv_heads, max_kv_size, offset, count = numbers[:8]
        tail_length, centred, *blocks = numbers[8:]
        config = TurboQuantConfig(k_bits, v_bits, block_size)
        cache = cls(config, head_dim, num_kv_heads, max_kv_size or None)
        tail = rest[: 2 if tail_length else 0]
        fits = (
            pages.dtype == mx.uint8
            and pages.shape[1:] == cache.pool.pages.shape[1:]
            and len(set(blocks)) == len(blocks) == -(-count // block_size)
            and all(0 <= block < pages.shape[0] for block in blocks)
            and 0 <= count <= offset
            and 0 <= tail_length <= min(count, TAIL)
            and centred in (0, 1)
            and len(rest) == (2 if tail_length else 0) + 4 * centred
            and all(x.shape == (num_kv_heads, TAIL, head_dim) for x in tail)
        )
        if not fits:
            raise ValueError(f"pages {pages.shape} do not fit their header {header.tolist()}")
        scales = cache.layout.split(pages)[-1].view(mx.float16)
        if not mx.isfinite(scales).all().item():
            raise ValueError("pages hold scales that are not finite")
        if centred:
            cache.centre = Centre.from_arrays(rest[-4:], num_kv_heads, head_dim)
        if tail:
            cache.tail.arrays, cache.tail.length = tuple(tail), tail_length
        cache.pool.adopt(pages, blocks)
        cache.table.hold(blocks, count)
        cache.offset = offset
        return cache
