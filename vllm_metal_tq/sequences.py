"""The sequences of one layer that take their steps together: pages, tails, positions."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import attention, codec, dispatch
from .centre import Centre, alike
from .pages import BlockTable, PagePool, blocks_needed
from .tail import FEW, Tail


def most_tokens(window: int, block_size: int, chunk: int = 1) -> int:
    """The most tokens that a sequence with a window holds after a chunk of so many."""
    return window - 1 + FEW + block_size - 1 + chunk


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
        window: how many tokens a query sees, itself included; 0 is all. Blocks behind the window
            are dropped before the next chunk: see ``most_tokens``.

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
        window: int = 0,
    ):
        self.pool = pool
        self.centre = centre
        self.max_kv_size = max_kv_size
        self.window = window
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
            values: ``(B, num_kv_heads, L, v_head_dim)``.
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
        values = codec.widened(values, self.pool.layout)
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
        outdated = [self._outdated(i, n) for i, n in enumerate(counts)]
        needed = blocks_needed(self.tables, counts) if self.tables else 0
        freed = sum(t.freed(some) for t, some in zip(self.tables, outdated, strict=True))
        self.pool.reserve(needed - freed)  # before anything is dropped: it may raise
        for i, some in enumerate(outdated):
            self._evict(i, some)
        self.pool.compact(needed)

    def _keep_recent(self, counts: list[int]) -> None:
        """Tails from before a chunk, where it will see them."""
        self._recent = [
            self.tail.ordered(i, table.num_tokens) if n and self._sees_chunk(n) else ()
            for i, (table, n) in enumerate(zip(self.tables, counts, strict=True))
        ]

    def stored_before(self, counts: Sequence[int]) -> list[int]:
        """Tokens of each sequence that will be there once so many more have room."""
        size = self.pool.layout.config.block_size
        outdated = [self._outdated(i, n) for i, n in enumerate(counts)]
        return [
            table.num_tokens - (some.stop - some.start) * size
            for table, some in zip(self.tables, outdated, strict=True)
        ]

    def _outdated(self, which: int, count: int) -> slice:
        """Blocks of a sequence that are dropped before so many more tokens."""
        table = self.tables[which]
        if self.window:  # a few more are kept, so that the last tokens can be trimmed
            return table.oldest(table.num_tokens - (self.window - 1) - FEW)
        if self.max_kv_size is not None:
            return table.oldest_but_first(table.num_tokens + count - self.max_kv_size)
        return slice(0, 0)

    def _evict(self, which: int, some: slice) -> None:
        table = self.tables[which]
        if dropped := table.evict(some):
            remaining = table.num_tokens - some.start * self.pool.layout.config.block_size
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
    ) -> mx.array:
        """Attend from the chunk that was just stored.

        Args:
            queries: ``(B, num_heads, L, head_dim)``.
            keys: ``(B, num_kv_heads, L, head_dim)``, as the model made them.
            values: ``(B, num_kv_heads, L, v_head_dim)``.
            scale: factor of the logits.
            mask: None, "causal", or an array ``(..., L, S + L)`` over the S tokens of the longest
                sequence before the chunk, those of the others at its end, and the chunk. With a
                window None and "causal" are meant within it; an array must say itself what of
                it is seen, and S may be the last ``window - 1`` tokens before the chunk.
            sinks: a learned logit for each head, ``(num_heads,)``, or None.

        Returns:
            ``(B, num_heads, L, v_head_dim)`` in the queries' dtype, zeros for padding.
        """
        output = self._attend(
            queries, keys, codec.widened(values, self.pool.layout), scale, mask, sinks
        )
        return output[..., : self.pool.layout.v_head_dim]

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: attention.Mask,
        sinks: mx.array | None,
    ) -> mx.array:
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
                window=self.window,
            )
            if attended is not None:
                return attended
        outputs = []
        for i, some in enumerate(self._columns):
            q, k, v = (x[i : i + 1, :, some] for x in (queries, keys, values))
            own = self._own_mask(mask, i, length)
            output = self._attend_alone(i, q, k, v, own, scale, sinks, shifts[i])
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
        past = mask[..., some, max(chunk - stored, 0) : chunk]
        return mx.concatenate([past, mask[..., some, chunk:][..., some]], axis=-1)

    def _attend_alone(
        self,
        which: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: attention.Mask,
        scale: float,
        sinks: mx.array | None,
        shift: int,
    ) -> mx.array:
        """Attend from the tokens of one sequence in the chunk."""
        length, table = keys.shape[2], self.tables[which]
        if not length:
            return queries  # padding alone
        keys, values = self._with_recent(which, keys, values)
        unseen = self._unseen(table.num_tokens, length, keys.shape[2])
        num_tokens = table.num_tokens - unseen
        if self.window and isinstance(mask, mx.array):
            mask = attention.last_columns(mask, num_tokens)
        elif self.window and num_tokens > self.window:
            mask = attention.window_mask(length, num_tokens, self.window)
        past_length = num_tokens - keys.shape[2]
        if self.raw_window is not None:
            mask = attention.decode_mask(mask, length, num_tokens, keys.shape[2], self.raw_window)
            past_length = num_tokens
        output = dispatch.attend(
            queries,
            keys,
            values,
            self.pool,
            table.blocks[unseen // self.pool.layout.config.block_size :],
            past_length,
            scale=scale,
            mask=mask,
            sinks=sinks,
            centre=self.centre,
            shift=shift + unseen,
        )
        return self._with_stored(output)

    def _with_stored(self, output: mx.array) -> mx.array:
        """``output``, with which comes what was stored and not read, as mlx_lm's caches have it.

        Another thread, which may go on, could not evaluate what this one began.
        """
        stored = [self.pool.pages, *(self.tail.arrays or ())]
        whole: mx.array = mx.depends(output, stored)
        return whole

    def _unseen(self, num_tokens: int, length: int, recent: int) -> int:
        """How many of a sequence's tokens need not be read: whole blocks, or the whole past.

        Args:
            num_tokens: tokens stored.
            length: those of them in the chunk.
            recent: those of them that are there as they came.
        """
        past = num_tokens - recent
        first = max(num_tokens - length + 1 - self.window, 0) if self.window else 0  # that is seen
        if first >= past and self.raw_window is None:
            return past
        size = self.pool.layout.config.block_size
        return min(first, past) // size * size

    def _with_recent(
        self, which: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """What is seen as it came: tokens before a chunk of one sequence, and the chunk."""
        if not self._sees_chunk(keys.shape[2]):
            recent = self.tail.ordered(which, self.tables[which].num_tokens)
            return recent[0][None], recent[1][None]
        if not self._recent[which]:
            return keys, values
        old_keys, old_values = (x[None] for x in self._recent[which])
        return mx.concatenate([old_keys, keys], axis=2), mx.concatenate([old_values, values], 2)

    def restored(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of all tokens, those of the chunk that was just stored among them.

        Args:
            keys: ``(B, num_kv_heads, L, head_dim)``, as the model made them.
            values: ``(B, num_kv_heads, L, v_head_dim)``.

        Returns:
            ``(B, num_kv_heads, S, head_dim)`` and ``(B, num_kv_heads, S, v_head_dim)`` in the
            chunk's dtype. What a query sees as it came, is as it came; the rest is read from the
            pages.

        Raises:
            ValueError: the sequences differ in length.
        """
        if len(set(self.lengths)) > 1:
            raise ValueError(f"sequences of {self.lengths} tokens cannot be handed out together")
        wide = codec.widened(values, self.pool.layout)
        parts = [
            self._restored(i, keys[i : i + 1], wide[i : i + 1]) for i in range(len(self.tables))
        ]
        all_keys, all_values = (
            mx.concatenate(list(x)) if len(x) > 1 else x[0] for x in zip(*parts, strict=True)
        )
        return self._with_stored(all_keys), all_values[..., : values.shape[-1]]

    def _restored(self, which: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self._with_recent(which, keys, values)
        table = self.tables[which]
        return dispatch.restore(
            keys,
            values,
            self.pool,
            table.blocks,
            table.num_tokens - keys.shape[2],
            centre=self.centre,
            shift=self.offsets[which] - table.num_tokens,
        )

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

    @property
    def trimmable(self) -> int:
        """How many of the last tokens can be trimmed without missing any that were dropped."""
        pairs = zip(self.offsets, self.lengths, strict=True)
        lost = max(self.window - 1, 0)
        return min((n if n == o else n - lost for o, n in pairs), default=0)

    def trim(self, count: int) -> None:
        """Forget the last ``count`` tokens of each sequence.

        Raises:
            ValueError: what the tokens before them see was dropped; nothing is forgotten.
        """
        if (most := self.trimmable) < count:
            raise ValueError(f"{count} tokens cannot be trimmed: at most the last {most}")
        self.tail.trim(count, self.lengths)
        for table in self.tables:
            table.trim(count)
        self.offsets = [offset - count for offset in self.offsets]

    def like(self, count: int, pool: PagePool | None = None) -> Sequences:
        """As many new sequences with the settings of these."""
        new = Sequences(
            pool or self.pool,
            count,
            centre=self.centre,
            max_kv_size=self.max_kv_size,
            window=self.window,
        )
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
        ours, theirs = (
            (x.pool.layout, x.pool.num_kv_heads, x.max_kv_size, x.window) for x in (self, others)
        )
        if ours != theirs or not alike(self.centre, others.centre):
            ours_said, theirs_said = (
                f"{layout.config.label}, max_kv_size {limit}, window {window}"
                for layout, _, limit, window in (ours, theirs)
            )
            raise ValueError(
                "sequences of one batch must have the same widths, block size, limit, window and "
                f"calibration: {ours_said} cannot be joined by {theirs_said}"
            )
        self.tables = self.tables + [table.fork().moved(self.pool) for table in others.tables]
        self.tail = Tail.joined([self.tail, others.tail])
        self.offsets = self.offsets + others.offsets
        self._block_table = None
