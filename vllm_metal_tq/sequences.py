"""The sequences of one layer that take their steps together: pages, tails, positions."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import attention, dispatch
from .centre import Centre, alike
from .pages import BlockTable, PagePool, blocks_needed
from .tail import FEW, Tail


class Sequences:
    """B sequences of a layer. A chunk of new tokens is stored, then attended from.

    A chunk may be ragged: of each sequence some columns in a row are tokens, the others padding,
    which is neither stored nor attended from. Recent tokens are seen as they came and everything
    older through the pages: by a chunk of up to ``FEW`` tokens the last ``TAIL``, the chunk among
    them; by a longer one itself and ``TAIL`` before it.

    Args:
        pool: where pages are.
        count: B.
        centre: calibration of the layer, or None.
        max_kv_size: when more tokens of a sequence are stored, its oldest blocks but the first
            are dropped before the next chunk. None: no limit.

    Attributes:
        tables: the block table of each sequence.
        tail: the last tokens of each sequence as they came.
        offsets: tokens seen of each sequence, which is the position of its next one.
        raw_window: for measuring quality. When set, each query sees ``raw_window`` tokens, itself
            included, as they came, and all others through the pages: with ``TAIL`` what decoding
            token by token sees, with 1 what it would see without the tail.
    """

    def __init__(
        self,
        pool: PagePool,
        count: int = 1,
        *,
        centre: Centre | None = None,
        max_kv_size: int | None = None,
    ):
        self.pool = pool
        self.centre = centre
        self.max_kv_size = max_kv_size
        self.raw_window: int | None = None
        self.tables = [BlockTable(pool) for _ in range(count)]
        self.tail = Tail(count)
        self.offsets = [0] * count
        self._columns: list[slice] = []  # of the last chunk, those that are tokens
        self._recent: list[tuple[mx.array, ...]] = []  # tails that a long chunk sees before itself
        self._block_table: mx.array | None = None

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def lengths(self) -> list[int]:
        """Tokens stored of each sequence."""
        return [table.num_tokens for table in self.tables]

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and tails held; blocks that others hold too are counted as well."""
        blocks = sum(len(table.blocks) for table in self.tables)
        return blocks * self.pool.block_bytes + self.tail.nbytes

    def store(
        self, keys: mx.array, values: mx.array, columns: Sequence[slice] | None = None
    ) -> None:
        """Store a chunk.

        Args:
            keys: ``(B, num_kv_heads, L, head_dim)``, after RoPE.
            values: the same shape.
            columns: of each sequence, which of the L are its tokens. None: all of them.

        Raises:
            ValueError: the shapes do not fit, or an element cannot be encoded; nothing is stored.
            OutOfBlocks: the pool is full; nothing is stored.
        """
        expected = len(self), self.pool.num_kv_heads
        if keys.ndim != 4 or keys.shape[:2] != expected:
            raise ValueError(
                f"keys {keys.shape} do not fit: this cache holds {expected[0]} sequences of "
                f"{expected[1]} KV heads, as (B, num_kv_heads, L, head_dim)"
            )
        self._columns = list(columns or [slice(0, keys.shape[2])] * len(self))
        counts = self._counts()
        groups = self._groups(counts, keys.shape[2])
        chunks = [self._chunk(keys, values, group) for group in groups]
        encoded = [dispatch.encode(chunk, self._encoding) for chunk in chunks]
        self._make_room(counts)
        self._keep_recent(counts)
        apart = any(len(group) < len(self) for group in groups)
        tails = {i: self.tail.take([i]) for i in range(len(self))} if apart else {}
        for group, chunk, rows in zip(groups, chunks, encoded, strict=True):
            tail = tails.get(group[0], self.tail)
            dispatch.store(chunk, tail, rows, self._encoding)
        if tails:
            self.tail = Tail.joined(list(tails.values()))
        self.offsets = [offset + n for offset, n in zip(self.offsets, counts, strict=True)]

    @property
    def _encoding(self) -> Centre | None:
        """What new tokens are stored with."""
        return self.centre

    def _groups(self, counts: list[int], length: int) -> list[list[int]]:
        """Sequences that are stored in one go: all of them, or each of those with tokens alone."""
        kept = {self._uncentred(i, n) for i, n in enumerate(counts)}
        if counts == [length] * len(self) and len(kept) == 1:
            return [list(range(len(self)))] if length else []
        return [[i] for i, n in enumerate(counts) if n]

    def _chunk(self, keys: mx.array, values: mx.array, group: list[int]) -> dispatch.Chunk:
        """The new tokens of some sequences, all of them or one."""
        first, some = group[0], self._columns[group[0]]
        if len(group) < len(self) or some != slice(0, keys.shape[2]):
            keys, values = (x[first : first + 1, :, some] for x in (keys, values))
        return dispatch.Chunk(
            keys,
            values,
            [self.tables[i] for i in group],
            [self.offsets[i] for i in group],
            self._uncentred(first, some.stop - some.start),
        )

    def _counts(self) -> list[int]:
        return [max(some.stop - some.start, 0) for some in self._columns]

    def _uncentred(self, which: int, count: int) -> int:
        """How many of the next tokens are stored without a flag for their keys' mean.

        The first block of a limited cache keeps its place when others are dropped, so that its
        positions are no longer its indices plus a constant.
        """
        if self.max_kv_size is None or self.centre is None:
            return 0
        fixed = self.pool.layout.config.block_size
        return max(min(fixed - self.offsets[which], count), 0)

    def _make_room(self, counts: list[int]) -> None:
        """What happens once a chunk is known to be good, before it is stored."""
        excess = [self._excess(i, n) for i, n in enumerate(counts)]
        needed = blocks_needed(self.tables, counts) if self.tables else 0
        freed = sum(t.freed(n) for t, n in zip(self.tables, excess, strict=True))
        self.pool.reserve(needed - freed)  # before anything is dropped: it may raise
        for i, n in enumerate(excess):
            self._evict(i, n)
        self.pool.compact()

    def _keep_recent(self, counts: list[int]) -> None:
        """Tails from before a chunk, where it will see them."""
        self._recent = [
            self.tail.ordered(i, table.num_tokens) if n and self._sees_chunk(n) else ()
            for i, (table, n) in enumerate(zip(self.tables, counts, strict=True))
        ]

    def stored_before(self, counts: Sequence[int]) -> list[int]:
        """Tokens of each sequence that will be there once so many more have room."""
        return [
            table.num_tokens - table.evictable(self._excess(i, n))
            for i, (table, n) in enumerate(zip(self.tables, counts, strict=True))
        ]

    def _excess(self, which: int, count: int) -> int:
        if self.max_kv_size is None:
            return 0
        return max(self.tables[which].num_tokens + count - self.max_kv_size, 0)

    def _evict(self, which: int, count: int) -> None:
        table = self.tables[which]
        before = table.num_tokens
        table.evict(count)
        if dropped := before - table.num_tokens:
            remaining = table.num_tokens - self.pool.layout.config.block_size
            self.tail.shift(which, dropped, remaining)

    def _sees_chunk(self, count: int) -> bool:
        """Whether a chunk sees all of itself and the tail before it, not the last tokens alone."""
        return count > FEW or self.raw_window is not None

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: attention.Mask = None,
        sinks: mx.array | None = None,
        window: int = 0,
    ) -> mx.array:
        """Attend from the chunk that was just stored.

        Args:
            queries: ``(B, num_heads, L, head_dim)``.
            keys: ``(B, num_kv_heads, L, head_dim)``, as the model made them.
            values: the same shape.
            scale: factor of the logits.
            mask: None, "causal", or an array ``(..., L, S + L)`` over the S tokens of the longest
                sequence before the chunk, those of the others at its end, and the chunk.
            sinks: a learned logit for each head, ``(num_heads,)``, or None.
            window: how many tokens a query sees, itself included; 0 is all. With one, ``mask``
                must be None or "causal".

        Returns:
            ``(B, num_heads, L, head_dim)`` in the queries' dtype, zeros for padding.
        """
        length, counts = queries.shape[2], self._counts()
        shifts = [o - n for o, n in zip(self.offsets, self.lengths, strict=True)]
        if counts == [length] * len(self) and not self._sees_chunk(length):
            attended = dispatch.attend_last(
                queries,
                self.tables,
                self.tail,
                self.block_table,
                shifts,
                scale=scale,
                mask=mask,
                sinks=sinks,
                centre=self.centre,
                window=window,
            )
            if attended is not None:
                return attended
        outputs = []
        for i, some in enumerate(self._columns):
            q, k, v = (x[i : i + 1, :, some] for x in (queries, keys, values))
            own = self._own_mask(mask, i, length)
            output = self._attend_alone(i, q, k, v, own, window, scale, sinks, shifts[i])
            around = [(0, 0), (0, 0), (some.start, length - some.start - counts[i]), (0, 0)]
            outputs.append(mx.pad(output, around) if counts[i] < length else output)
        return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]

    def _own_mask(self, mask: attention.Mask, which: int, length: int) -> attention.Mask:
        """The mask of one sequence's tokens among themselves."""
        some, count = self._columns[which], self._counts()[which]
        if not isinstance(mask, mx.array):
            return mask
        if mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[which : which + 1]
        chunk, stored = mask.shape[-1] - length, self.tables[which].num_tokens - count
        past = mask[..., some, chunk - stored : chunk]
        return mx.concatenate([past, mask[..., some, chunk:][..., some]], axis=-1)

    def _attend_alone(
        self,
        which: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: attention.Mask,
        window: int,
        scale: float,
        sinks: mx.array | None,
        shift: int,
    ) -> mx.array:
        """Attend from the tokens of one sequence in the chunk."""
        length, table = keys.shape[2], self.tables[which]
        if not length:
            return queries  # padding alone
        if not self._sees_chunk(length):
            keys, values = (x[None] for x in self.tail.ordered(which, table.num_tokens))
        elif self._recent[which]:
            recent = zip(self._recent[which], (keys, values), strict=True)
            keys, values = (mx.concatenate([old[None], new], axis=2) for old, new in recent)
        past_length, blocks = table.num_tokens - keys.shape[2], table.blocks
        if window and table.num_tokens > window:
            size = self.pool.layout.config.block_size
            first = max(table.num_tokens - length + 1 - window, 0)  # that anybody sees
            unseen = first // size * size if first < past_length else past_length
            blocks, past_length = blocks[unseen // size :], past_length - unseen
            shift += unseen
            mask = attention.window_mask(length, past_length + keys.shape[2], window)
        if self.raw_window is not None:
            mask = attention.decode_mask(
                mask, length, table.num_tokens, keys.shape[2], self.raw_window
            )
            past_length = table.num_tokens
        output = dispatch.attend(
            queries,
            keys,
            values,
            self.pool,
            blocks,
            past_length,
            scale=scale,
            mask=mask,
            sinks=sinks,
            centre=self.centre,
            shift=shift,
        )
        # What was stored and not read comes with the output, as the caches of mlx_lm do: another
        # thread, which may go on, could not evaluate what this one began.
        stored = [self.pool.pages, *(self.tail.arrays or ())]
        whole: mx.array = mx.depends(output, stored)
        return whole

    @property
    def block_table(self) -> mx.array:
        """The blocks as kernels take them: int32 ``(B, max_blocks)``, padded with zeros."""
        most = max(len(table.blocks) for table in self.tables)
        if self._block_table is None or most > self._block_table.shape[1]:
            # A power of two, so that shapes, and what is compiled for them, seldom change.
            width = max(64, 1 << (most - 1).bit_length())
            padded = [t.blocks + [0] * (width - len(t.blocks)) for t in self.tables]
            self._block_table = mx.array(padded, mx.int32)
        else:
            for i, table in enumerate(self.tables):
                if new := table.blocks[table.unchanged :]:
                    end = len(table.blocks)
                    self._block_table[i, table.unchanged : end] = mx.array(new, mx.int32)
        for table in self.tables:
            table.unchanged = len(table.blocks)
        return self._block_table

    def trim(self, count: int) -> None:
        """Forget the last ``count`` tokens of each sequence."""
        self.tail.trim(count, self.lengths)
        for table in self.tables:
            table.trim(count)
        self.offsets = [offset - count for offset in self.offsets]

    def like(self, count: int, pool: PagePool | None = None) -> Sequences:
        """As many new sequences with the settings of these."""
        new = Sequences(pool or self.pool, count, centre=self.centre, max_kv_size=self.max_kv_size)
        new.raw_window = self.raw_window
        return new

    def take(self, which: Sequence[int]) -> Sequences:
        """Some of the sequences, as others of the same tokens: blocks are shared."""
        new = self.like(0)
        new.tables = [self.tables[i].fork() for i in which]
        new.tail, new.offsets = self.tail.take(which), [self.offsets[i] for i in which]
        return new

    def keep(self, which: Sequence[int]) -> None:
        """Forget all sequences but some, which come in the order of ``which``."""
        again = len(set(which)) < len(which)
        self.tables = [self.tables[i].fork() if again else self.tables[i] for i in which]
        self.tail, self.offsets = self.tail.take(which), [self.offsets[i] for i in which]
        self._block_table = None

    def extend(self, others: Sequences) -> None:
        """Add ``others``, which stay as they are: blocks are shared, or copied to this pool.

        Raises:
            ValueError: they were stored with other widths, another centre or another limit.
            OutOfBlocks: there is no room for copies; nothing has changed.
        """
        ours, theirs = ((x.pool.layout, x.pool.num_kv_heads, x.max_kv_size) for x in (self, others))
        if ours != theirs or not alike(self.centre, others.centre):
            raise ValueError(
                "sequences of one batch must have the same widths, block size, limit and "
                f"calibration: {ours[0].config.label}, max_kv_size {ours[2]} cannot be joined by "
                f"{theirs[0].config.label}, max_kv_size {theirs[2]}"
            )
        self.tables = self.tables + [table.fork().moved(self.pool) for table in others.tables]
        self.tail = Tail.joined([self.tail, others.tail])
        self.offsets = self.offsets + others.offsets
        self._block_table = None
