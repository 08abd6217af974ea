"""Pages of one layer: a pool that owns them, and the block table of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from .layout import PageLayout

GROWTH_TOKENS = 256  # as mlx_lm's caches grow


@lru_cache(maxsize=2)
def places(slots: tuple[int, ...], num_kv_heads: int, layout: PageLayout) -> tuple[mx.array, ...]:
    """Block, head and offset of every byte of some rows. Layers share them: hence the cache."""
    block, place = np.divmod(np.array(slots, np.uint32), layout.config.block_size)
    parts = [mx.array(block)[:, None], _heads(num_kv_heads), _offsets(layout, *place.tolist())]
    # Of one dtype and shape: otherwise MLX would convert them anew in every layer.
    shape = (num_kv_heads, len(slots), layout.row_bytes)
    return tuple(mx.broadcast_to(x, shape) for x in parts)


# Kept, because with CUDA an array of over 8 bytes that the host makes costs as much as launches.
@lru_cache(maxsize=64)
def _offsets(layout: PageLayout, *places: int) -> mx.array:
    return mx.array(layout.byte_offsets[list(places)])


@lru_cache
def _heads(num_kv_heads: int) -> mx.array:
    return mx.array(np.arange(num_kv_heads, dtype=np.uint32))[:, None, None]


def scatter(pages: mx.array, rows: mx.array, *where: mx.array) -> mx.array:
    """Pages with rows in their ``places``: in place where nobody else holds ``pages``."""
    pages[where] = rows
    return pages


_scatter = mx.compile(scatter)  # looking at indices in Python takes longer than the launch


class PagePool:
    """All pages of one layer, and which blocks of them are free.

    A block is ``block_size`` tokens; it has one page for each KV head.

    Attributes:
        layout: the bytes of a page.
        num_kv_heads: pages of a block.
        pages: uint8 ``(num_blocks, num_kv_heads, page_bytes)``, all that the pool allocates.
    """

    def __init__(self, layout: PageLayout, num_kv_heads: int):
        self.layout = layout
        self.num_kv_heads = num_kv_heads
        self.pages = mx.zeros((0, num_kv_heads, layout.page_bytes), mx.uint8)
        self._free: list[int] = []

    @property
    def num_blocks(self) -> int:
        """Blocks allocated, in use or free."""
        return self.pages.shape[0]

    @property
    def num_free(self) -> int:
        """Blocks allocated but not in use."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks out of the pool, which grows where it must."""
        missing = count - self.num_free
        if missing > 0:
            self._grow(missing)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def release(self, blocks: list[int]) -> None:
        """Give blocks back."""
        self._free = sorted(self._free + blocks)

    def adopt(self, pages: mx.array, used: list[int]) -> None:
        """Take over ``pages`` as they were saved, with the blocks in use."""
        self.pages = pages
        self._free = sorted(set(range(self.num_blocks)) - set(used))

    def write(self, slot_mapping: Sequence[int], rows: mx.array) -> None:
        """Scatter rows into their slots, in place where nobody else holds ``pages``.

        Args:
            slot_mapping: for each token, block * block_size + place in the block.
            rows: uint8 ``(num_kv_heads, num_tokens, row_bytes)``.
        """
        where = places(tuple(slot_mapping), self.num_kv_heads, self.layout)
        self.pages = _scatter(self.pages, rows, *where)

    def read(self, blocks: list[int]) -> mx.array:
        """Gather the pages of ``blocks``: uint8 ``(num_kv_heads, len(blocks), page_bytes)``."""
        return self.pages[mx.array(blocks, mx.int32)].swapaxes(0, 1)

    def _grow(self, missing: int) -> None:
        step = GROWTH_TOKENS // self.layout.config.block_size
        more = -(-missing // step) * step
        self._free += range(self.num_blocks, self.num_blocks + more)
        new = mx.zeros((more, *self.pages.shape[1:]), mx.uint8)
        self.pages = mx.concatenate([self.pages, new]) if self.num_blocks else new


class BlockTable:
    """The blocks of one sequence, in order, and how many tokens they hold."""

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.blocks: list[int] = []
        self.num_tokens = 0
        self._block_table: mx.array | None = None

    @property
    def _block_size(self) -> int:
        return self.pool.layout.config.block_size

    @property
    def block_table(self) -> mx.array:
        """The blocks as kernels take them: int32 ``(1, max_blocks)``, padded with zeros."""
        if self._block_table is None:
            # A power of two, so that shapes, and what is compiled for them, seldom change.
            max_blocks = max(64, 1 << (len(self.blocks) - 1).bit_length())
            padded = [*self.blocks, *[0] * (max_blocks - len(self.blocks))]
            self._block_table = mx.array([padded], mx.int32)
        return self._block_table

    def hold(self, blocks: list[int], num_tokens: int) -> None:
        """Take over blocks as they were saved, in order, and how many tokens they hold."""
        self.blocks, self.num_tokens, self._block_table = blocks, num_tokens, None

    def append(self, rows: mx.array) -> None:
        """Store the rows of new tokens: uint8 ``(num_kv_heads, num_tokens, row_bytes)``."""
        self.pool.write(self.extend(rows.shape[1]), rows)

    def extend(self, count: int) -> tuple[int, ...]:
        """Make room for ``count`` more tokens; returns their slot mapping."""
        size, start, end = self._block_size, self.num_tokens, self.num_tokens + count
        missing = -(-end // size) - len(self.blocks)
        if missing:
            self._add(self.pool.allocate(missing))
        self.num_tokens = end
        return tuple(self.blocks[i // size] * size + i % size for i in range(start, end))

    def _add(self, blocks: list[int]) -> None:
        old, new = len(self.blocks), len(self.blocks) + len(blocks)
        self.blocks += blocks
        if self._block_table is not None and new <= self._block_table.shape[1]:
            self._block_table[0, old:new] = mx.array(blocks, mx.int32)
        else:
            self._block_table = None

    def read(self, num_tokens: int) -> mx.array:
        """Pages that hold the first tokens: uint8 ``(num_kv_heads, num_pages, page_bytes)``."""
        return self.pool.read(self.blocks[: -(-num_tokens // self._block_size)])

    def compact(self) -> None:
        """Shrink the pool to this table's blocks where most of it is free. No other may use it."""
        if self.pool.num_free * self._block_size > 2 * GROWTH_TOKENS:
            pages = self.pool.pages[mx.array(self.blocks, mx.int32)]
            self.hold(list(range(len(self.blocks))), self.num_tokens)
            self.pool.adopt(pages, self.blocks)

    def trim(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self.num_tokens -= count
        keep = -(-self.num_tokens // self._block_size)
        if keep < len(self.blocks):
            self.pool.release(self.blocks[keep:])
            del self.blocks[keep:]

    def evictable(self, count: int) -> int:
        """How many tokens ``evict`` drops to make room for ``count``: whole blocks only."""
        full = self.num_tokens // self._block_size
        return min(-(-count // self._block_size), max(full - 1, 0)) * self._block_size

    def evict(self, count: int) -> None:
        """Drop the oldest blocks but the first, ``evictable(count)`` tokens in all.

        The first block stays because models put much of their attention on the first tokens
        (attention sinks, arXiv:2309.17453).
        """
        dropped = self.evictable(count)
        if not dropped:
            return
        gone = slice(1, 1 + dropped // self._block_size)
        self.pool.release(self.blocks[gone])
        del self.blocks[gone]
        self._block_table = None
        self.num_tokens -= dropped
