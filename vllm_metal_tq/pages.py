"""Pages of one layer: a pool that owns them, and the block tables of sequences."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakSet

import mlx.core as mx
import numpy as np

from .layout import PageLayout

GROWTH_TOKENS = 256  # as mlx_lm's caches grow, or by GROWTH_SHARE of what there is
GROWTH_SHARE = 1 / 8

Slots = tuple[tuple[int, ...], ...]
"""Of each sequence, for each of its new tokens: block * block_size + place in the block."""


class OutOfBlocks(MemoryError):  # noqa: N818 (its name says what it is)
    """A pool would have to grow beyond its budget. Nothing was stored."""


@lru_cache(maxsize=8)  # a packed batch takes several
def places(slot_mapping: Slots, num_kv_heads: int, layout: PageLayout) -> tuple[mx.array, ...]:
    """Block, head and offset of every byte of some rows. Layers share them: hence the cache."""
    block, place = np.divmod(np.array(slot_mapping, np.uint32), layout.config.block_size)
    parts = [
        mx.array(block)[:, None, :, None],
        _heads(num_kv_heads),
        mx.unflatten(_offsets(layout, *place.flatten().tolist()), 0, place.shape)[:, None],
    ]
    # Of one dtype and shape: otherwise MLX would convert them anew in every layer.
    shape = (len(block), num_kv_heads, block.shape[1], layout.row_bytes)
    where = tuple(mx.broadcast_to(x, shape) for x in parts)
    mx.async_eval(where)  # what is kept may be used in another thread, which could not begin it
    return where


# Kept, because with CUDA an array of over 8 bytes that the host makes costs as much as launches.
@lru_cache(maxsize=64)
def _offsets(layout: PageLayout, *places: int) -> mx.array:
    return mx.array(layout.byte_offsets[list(places)])


@lru_cache
def _heads(num_kv_heads: int) -> mx.array:
    return mx.array(np.arange(num_kv_heads, dtype=np.uint32).reshape(-1, 1, 1))


def scatter(pages: mx.array, rows: mx.array, *where: mx.array) -> mx.array:
    """Pages with rows in their ``places``: in place where nobody else holds ``pages``."""
    pages[where] = rows
    return pages


_scatter = mx.compile(scatter)  # looking at indices in Python takes longer than the launch


class PagePool:
    """All pages of one layer, which sequences share, and who uses which block.

    A block is ``block_size`` tokens; it has one page for each KV head. Several block tables may
    hold the same block; who writes to it copies it first (``BlockTable.extend``). The pool grows
    by an eighth, so that a copy of its pages is seldom made, and shrinks when most of it is free.

    Args:
        layout: the bytes of a page.
        num_kv_heads: pages of a block.
        max_blocks: the most blocks that the pool may have. None: no limit.

    Attributes:
        pages: uint8 ``(num_blocks, num_kv_heads, page_bytes)``, all that the pool allocates.
    """

    def __init__(self, layout: PageLayout, num_kv_heads: int, max_blocks: int | None = None):
        self.layout = layout
        self.num_kv_heads = num_kv_heads
        self.max_blocks = max_blocks
        self.pages = mx.zeros((0, num_kv_heads, layout.page_bytes), mx.uint8)
        self.tables: WeakSet[BlockTable] = WeakSet()
        self._users: list[int] = []  # of each block, how many block tables hold it
        self._free: list[int] = []
        self._dropped: deque[tuple[int, list[int]]] = deque()
        self.numbering = 0  # how often blocks have got other numbers

    @property
    def num_blocks(self) -> int:
        """Blocks allocated, in use or free."""
        return self.pages.shape[0]

    @property
    def num_free(self) -> int:
        """Blocks allocated but not in use. To be read in the thread that uses the pool."""
        self._collect()
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some block table holds; one that several hold counts once."""
        return self.num_blocks - self.num_free

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.num_kv_heads * self.layout.page_bytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.pages.nbytes

    @property
    def nbytes_bf16(self) -> int:
        """Bytes that as many blocks take uncompressed."""
        return self.num_blocks * self.num_kv_heads * self.layout.bf16_page_bytes

    def reserve(self, count: int) -> None:
        """See to it that ``count`` blocks are free.

        Raises:
            OutOfBlocks: the pool would have more than ``max_blocks``.
        """
        missing = count - self.num_free
        if missing <= 0:
            return
        if self.max_blocks is not None and self.num_blocks + missing > self.max_blocks:
            raise OutOfBlocks(
                f"the key-value cache is full: {count} more blocks of "
                f"{self.layout.config.block_size} tokens are needed, {self.num_used} of "
                f"{self.max_blocks} are in use"
            )
        self._grow(missing)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks out of the pool, which grows where it must: see ``reserve``."""
        self.reserve(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One block table more holds ``blocks``."""
        for block in blocks:
            self._users[block] += 1

    def users(self, block: int) -> int:
        """How many block tables hold ``block``."""
        self._collect()
        return self._users[block]

    def is_shared(self, block: int) -> bool:
        """Whether several block tables hold ``block``."""
        return self.users(block) > 1

    def release(self, blocks: list[int]) -> None:
        """One block table less holds ``blocks``."""
        for block in blocks:
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)

    def drop(self, blocks: list[int], numbering: int) -> None:
        """Release ``blocks`` soon: for what is called at any moment, in any thread.

        What was not known when blocks got other numbers was given back then.
        """
        self._dropped.append((numbering, blocks))

    def _collect(self) -> None:
        while self._dropped:
            numbering, blocks = self._dropped.popleft()
            if numbering == self.numbering:
                self.release(blocks)

    def check(self, blocks: Sequence[int]) -> None:
        """Refuse blocks that are not there: a kernel, and MLX, would read beyond the pages.

        Raises:
            ValueError: a number is below 0, or not below ``num_blocks``.
        """
        if blocks and (min(blocks) < 0 or max(blocks) >= self.num_blocks):
            wrong = next(block for block in blocks if not 0 <= block < self.num_blocks)
            raise ValueError(f"there is no block {wrong}: the pool has {self.num_blocks}")

    def copy(self, block: int) -> int:
        """A new block with the pages of ``block``."""
        (new,) = self.allocate(1)
        # Gathered and evaluated: what shares the pages' buffer would keep them from being written
        # in place.
        copied = self.pages[mx.array([block], mx.int32)]
        mx.eval(copied)
        self.put([new], copied)
        return new

    def put(self, blocks: list[int], pages: mx.array) -> None:
        """Write whole blocks: uint8 ``(len(blocks), num_kv_heads, page_bytes)``."""
        self.check(blocks)
        self.pages = _scatter(self.pages, pages, mx.array(blocks, mx.int32))

    def adopt(self, pages: mx.array, used: list[int]) -> None:
        """Take over ``pages`` as they were saved, with the blocks in use, each by one table."""
        self.pages, self._users = pages, [0] * pages.shape[0]
        self.share(used)
        self._free = [b for b in reversed(range(pages.shape[0])) if not self._users[b]]

    def write(self, slot_mapping: Slots, rows: mx.array) -> None:
        """Scatter rows into their slots, in place where nobody else holds ``pages``.

        Args:
            slot_mapping: of B sequences, the slots of L new tokens each.
            rows: uint8 ``(B, num_kv_heads, L, row_bytes)``.
        """
        size = self.layout.config.block_size
        self.check([slot // size for slots in slot_mapping for slot in slots])
        where = places(slot_mapping, self.num_kv_heads, self.layout)
        self.pages = _scatter(self.pages, rows, *where)

    def read(self, blocks: list[int]) -> mx.array:
        """Gather the pages of ``blocks``: uint8 ``(num_kv_heads, len(blocks), page_bytes)``."""
        self.check(blocks)
        return self.pages[mx.array(blocks, mx.int32)].swapaxes(0, 1)

    def compact(self, needed: int = 0) -> None:
        """Give free blocks back where they are more than two thirds, and not just a few.

        Blocks that are ``needed`` at once count as in use.
        """
        step = GROWTH_TOKENS // self.layout.config.block_size
        if self.num_free - needed <= 2 * max(self.num_used + needed, step):
            return
        tables = list(self.tables)  # held, so that none is dropped while numbers change
        self._collect()
        held = Counter(block for table in tables for block in table.blocks)
        kept = sorted(held)
        moved = {block: new for new, block in enumerate(kept)}
        self.adopt(self.pages[mx.array(kept, mx.int32)], [])
        self._users, self._free = [held[block] for block in kept], []
        mx.eval(self.pages)
        self.numbering += 1
        for table in tables:
            table.renumber(moved)

    def _grow(self, missing: int) -> None:
        step = GROWTH_TOKENS // self.layout.config.block_size
        more = max(-(-missing // step) * step, int(self.num_blocks * GROWTH_SHARE))
        if self.max_blocks is not None:
            more = min(more, self.max_blocks - self.num_blocks)
        self._free += reversed(range(self.num_blocks, self.num_blocks + more))
        self._users += [0] * more
        new = mx.zeros((more, *self.pages.shape[1:]), mx.uint8)
        if self.num_blocks:
            new = mx.concatenate([self.pages, new])
            mx.eval(new)  # or all layers, which grow in one step, would have both in memory
        self.pages = new


class BlockTable:
    """The blocks of one sequence, in order, and how many tokens they hold.

    Attributes:
        pool: where the blocks are.
        blocks: the blocks.
        num_tokens: tokens that they hold.
        unchanged: how many of the first blocks are those that a reader saw who set this.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.hold([], 0)
        pool.tables.add(self)

    def __del__(self) -> None:
        self.pool.drop(self.blocks, self._numbering)

    @property
    def _block_size(self) -> int:
        return self.pool.layout.config.block_size

    def fork(self) -> BlockTable:
        """Another table of the same tokens. Blocks are shared until one of the two writes."""
        other = BlockTable(self.pool)
        other.hold(list(self.blocks), self.num_tokens)
        self.pool.share(self.blocks)
        return other

    def moved(self, pool: PagePool) -> BlockTable:
        """A table of the same tokens in another pool: itself where it is there already."""
        if self.pool is pool:
            return self
        other = BlockTable(pool)
        other.hold(pool.allocate(len(self.blocks)), self.num_tokens)
        if self.blocks:
            pool.put(other.blocks, self.pool.read(self.blocks).swapaxes(0, 1))
        return other

    def hold(self, blocks: list[int], num_tokens: int) -> None:
        """Take over blocks, in order, and how many tokens they hold."""
        self.blocks, self.num_tokens, self.unchanged = blocks, num_tokens, 0
        self._numbering = self.pool.numbering

    def renumber(self, moved: dict[int, int]) -> None:
        """The pool has given its blocks other numbers."""
        self.hold([moved[block] for block in self.blocks], self.num_tokens)

    def missing(self, count: int) -> int:
        """Blocks that ``count`` more tokens need, whether older ones are dropped for them or not.

        A copy of a shared block is not among them.
        """
        return -(-(self.num_tokens + count) // self._block_size) - len(self.blocks)

    def written(self, count: int) -> list[int]:
        """The block that holds tokens already and gets the first of ``count`` more, if any."""
        return self.blocks[-1:] if count and self.num_tokens % self._block_size else []

    def extend(self, count: int) -> tuple[int, ...]:
        """Make room for ``count`` more tokens; returns their slots.

        Raises:
            OutOfBlocks: the pool is full; nothing has changed.
        """
        self.pool.reserve(blocks_needed([self], [count]))
        for shared in filter(self.pool.is_shared, self.written(count)):
            self.blocks[-1] = self.pool.copy(shared)
            self.pool.release([shared])
            self.unchanged = min(self.unchanged, len(self.blocks) - 1)
        self.blocks += self.pool.allocate(self.missing(count))
        size, start = self._block_size, self.num_tokens
        self.num_tokens += count
        return tuple(
            self.blocks[i // size] * size + i % size for i in range(start, self.num_tokens)
        )

    def append(self, rows: mx.array) -> None:
        """Store the rows of new tokens: uint8 ``(num_kv_heads, L, row_bytes)``."""
        self.pool.write((self.extend(rows.shape[1]),), rows[None])

    def read(self, num_tokens: int) -> mx.array:
        """Pages that hold the first tokens: uint8 ``(num_kv_heads, num_pages, page_bytes)``."""
        return self.pool.read(self.blocks[: -(-num_tokens // self._block_size)])

    def trim(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self.num_tokens -= count
        self._keep(slice(0, -(-self.num_tokens // self._block_size)))

    def oldest(self, count: int) -> slice:
        """The first of the full blocks that are to go for ``count`` tokens."""
        return slice(0, min(max(count, 0), self.num_tokens) // self._block_size)

    def oldest_but_first(self, count: int) -> slice:
        """The full blocks that are to go to make room for ``count`` tokens.

        The first block stays because models put much of their attention on the first tokens
        (attention sinks, arXiv:2309.17453).
        """
        full = self.num_tokens // self._block_size
        return slice(1, 1 + min(-(-max(count, 0) // self._block_size), max(full - 1, 0)))

    def freed(self, some: slice) -> int:
        """Blocks that ``evict`` gives back to the pool: those that no other table holds."""
        return sum(not self.pool.is_shared(block) for block in self.blocks[some])

    def evict(self, some: slice) -> int:
        """Drop some of the full blocks; returns how many tokens they held."""
        dropped = len(self.blocks[some]) * self._block_size
        self.num_tokens -= dropped
        self._keep(slice(0, some.start), slice(some.stop, None))
        return dropped

    def _keep(self, *parts: slice) -> None:
        kept = [block for part in parts for block in self.blocks[part]]
        gone = self.blocks[parts[0].stop :][: len(self.blocks) - len(kept)]
        if gone:
            self.unchanged = min(self.unchanged, parts[0].stop)
            self.blocks = kept
            self.pool.release(gone)


def blocks_needed(tables: Sequence[BlockTable], counts: Sequence[int]) -> int:
    """Blocks that tables of one pool need for so many more tokens each, copies included.

    Of a shared block that all of its users write to, the last one needs no copy.
    """
    extended = list(zip(tables, counts, strict=True))
    written = Counter(block for table, n in extended for block in table.written(n))
    copies = sum(min(n, tables[0].pool.users(block) - 1) for block, n in written.items())
    return sum(table.missing(n) for table, n in extended) + copies
