"""The compressed cache of one layer, with the methods that mlx_lm expects of a cache."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm.models.cache as host

from ... import attention, dispatch
from ...config import TurboQuantConfig
from ...layout import PageLayout
from ...pages import BlockTable, PagePool

STATE_VERSION = 1


class TurboQuantKVCache(host._BaseCache):
    """The keys and values of one layer, compressed in pages.

    It holds one sequence, or a batch of sequences that take every step together: to the pages
    these are one sequence with more KV heads.

    ``update_and_fetch`` stores a chunk and hands it back as it came; the attention that follows
    (see ``hook``) reads everything older from the pages.

    Args:
        config: widths and block size.
        head_dim: elements of a key and of a value.
        num_kv_heads: KV heads of the layer.
        max_kv_size: when more are stored, the oldest blocks but the first are dropped before the
            next chunk. None: no limit.
        raw_window: for measuring quality. When set, a query sees only the last ``raw_window``
            tokens of its chunk, itself included, as they came; 1 is decoding token by token.

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
    ):
        least = 2 * config.block_size
        if max_kv_size is not None and max_kv_size < least:
            raise ValueError(f"max_kv_size {max_kv_size} is too few: at least {least} (two blocks)")
        self.config = config
        self.max_kv_size = max_kv_size
        self.raw_window = raw_window
        self.offset = 0
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
        if keys.ndim != 4 or keys.shape[0] * keys.shape[1] != self.pool.num_kv_heads:
            raise ValueError(
                f"keys {keys.shape} do not fit: (B, num_kv_heads, L, head_dim) with "
                f"{self.pool.num_kv_heads} KV heads in all is what this cache holds"
            )
        rows = dispatch.encode(keys.flatten(0, 1), values.flatten(0, 1), self.layout)
        length = keys.shape[2]
        self.table.evict(self._excess(length))
        if self.max_kv_size is not None:
            self.table.compact()  # gives back what a chunk beyond the limit took
        self.table.append(rows)
        self.offset += length
        return keys, values

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
        length = keys.shape[2]
        past_length = self.table.num_tokens - length
        if self.raw_window is not None:
            mask = attention.decode_mask(mask, length, past_length, self.raw_window)
            past_length += length
        shape, batch = queries.shape, queries.shape[0]
        if batch > 1:
            if isinstance(mask, mx.array) and mask.ndim == 4:
                mask = mx.broadcast_to(mask, (*shape[:2], *mask.shape[2:])).flatten(0, 1)[None]
            sinks = None if sinks is None else mx.tile(sinks, batch)
            queries, keys, values = (x.flatten(0, 1)[None] for x in (queries, keys, values))
        return dispatch.attend(
            queries, keys, values, self.table, past_length, scale=scale, mask=mask, sinks=sinks
        ).reshape(shape)

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
        """Bytes allocated."""
        return self.pool.pages.nbytes

    @property
    def nbytes_bf16(self) -> int:
        """Bytes that the same token slots take in bf16."""
        return self.pool.num_blocks * self.pool.num_kv_heads * self.layout.bf16_page_bytes

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """The pages, and one int32 array of everything else."""
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
        ]
        # An empty array cannot be saved, so an empty pool passes for one free block.
        pages = self.pool.pages
        if not self.pool.num_blocks:
            pages = mx.zeros((1, *pages.shape[1:]), mx.uint8)
        return pages, mx.array(header + self.table.blocks, mx.int32)

    @state.setter
    def state(self, state: tuple[mx.array, mx.array]) -> None:
        self.__dict__.update(vars(self.from_state(state)))

    @classmethod
    def from_state(cls, state, meta_state=None) -> TurboQuantKVCache:
        """Rebuild a cache from ``state``; mlx_lm before 0.32 passes an empty ``meta_state``.

        Raises:
            ValueError: ``state`` is of another version, or its parts contradict each other.
        """
        pages, header = state
        version, *numbers = header.tolist()
        if version != STATE_VERSION:
            raise ValueError(f"state version {version} is unknown: {STATE_VERSION} can be read")
        k_bits, v_bits, block_size, head_dim, num_kv_heads, max_kv_size, offset, count = numbers[:8]
        config = TurboQuantConfig(k_bits, v_bits, block_size)
        cache = cls(config, head_dim, num_kv_heads, max_kv_size or None)
        blocks = numbers[8:]
        fits = (
            pages.dtype == mx.uint8
            and pages.shape[1:] == cache.pool.pages.shape[1:]
            and len(set(blocks)) == len(blocks) == -(-count // block_size)
            and all(0 <= block < pages.shape[0] for block in blocks)
            and 0 <= count <= offset
        )
        if not fits:
            raise ValueError(f"pages {pages.shape} do not fit their header {header.tolist()}")
        scales = cache.layout.split(pages)[-1].view(mx.float16)
        if not mx.isfinite(scales).all().item():
            raise ValueError("pages hold scales that are not finite")
        cache.pool.adopt(pages, blocks)
        cache.table.hold(blocks, count)
        cache.offset = offset
        return cache
