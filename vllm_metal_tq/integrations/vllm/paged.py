"""The compressed cache of a layer in blocks that an engine gives, for packed batches.

The engine owns the numbers of blocks: which hold a sequence, which are free, shared or reused.
Here are the pages behind the numbers, and the last tokens of each request as they came. Those are
known by request, as long as it goes on where it was: what an engine takes back, preempts or finds
in its prefix cache starts without them, and pages alone serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import mlx.core as mx

from ...centre import Centre
from ...layout import PageLayout
from ...pages import BlockTable, PagePool
from ...sequences import Sequences
from ...tail import FEW, Tail


@dataclass(frozen=True)
class Segment:
    """The new tokens of one request in a packed batch.

    Attributes:
        request: who it is, as long as it goes on.
        columns: where in the batch its tokens are.
        offset: how many tokens of the request there are before these.
        blocks: the blocks of its pages, in order, those for the new tokens among them. The same
            list as before, longer perhaps, where those of older tokens have not changed.
        by_index: whether the positions of the tokens are their indices.
    """

    request: str
    columns: slice
    offset: int
    blocks: list[int]
    by_index: bool = True

    @property
    def count(self) -> int:
        """New tokens."""
        return int(self.columns.stop - self.columns.start)


class EnginePool(PagePool):
    """Pages of blocks that an engine numbers: nothing is allocated, moved or given back here.

    Args:
        layout: the bytes of a page.
        num_kv_heads: pages of a block.
        num_blocks: blocks of ``layout.config.block_size`` tokens.
    """

    def __init__(self, layout: PageLayout, num_kv_heads: int, num_blocks: int):
        super().__init__(layout, num_kv_heads, num_blocks)
        self.adopt(mx.zeros((num_blocks, num_kv_heads, layout.page_bytes), mx.uint8), [])

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks, ``(from, to)`` each."""
        source, target = zip(*pairs, strict=True)
        self.check(source)
        pages = self.pages[mx.array(source, mx.int32)]
        mx.eval(pages)  # what shares the pages' buffer would keep them from being written in place
        self.put(list(target), pages)


class KernelTables:
    """Block tables as kernels take them, each made once for all layers that have these blocks."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], _Made] = {}
        self._asked: dict[tuple[int, ...], _Made] = {}

    def begin(self) -> None:
        """A forward pass begins: what the last one did not ask for is forgotten."""
        self._made, self._asked = self._asked, {}

    def of(self, lists: list[list[int]], pool: PagePool) -> mx.array:
        """Int32 ``(B, max_blocks)``, padded with zeros, of the blocks of B sequences.

        Args:
            lists: as segments have them: a list that was given before is at most longer.
            pool: where the blocks are; those of all layers have as many.

        Raises:
            ValueError: a block is not there.
        """
        which = tuple(map(id, lists))
        made = self._asked.get(which) or self._made.get(which) or _Made(lists)
        self._asked[which] = made
        return made.table(pool)


class _Made:
    """The table of some lists of blocks, and how much of them it shows."""

    def __init__(self, lists: list[list[int]]):
        self._lists, self._shown = lists, [0] * len(lists)  # held, so that no other has their ids
        self._table: mx.array | None = None

    def table(self, pool: PagePool) -> mx.array:
        lengths = [len(blocks) for blocks in self._lists]
        for blocks, start in zip(self._lists, self._shown, strict=True):
            pool.check(blocks[start:])
        if self._table is None or max(lengths) > self._table.shape[1]:
            # A power of two, so that shapes, and what is compiled for them, seldom change.
            width = max(64, 1 << (max(lengths) - 1).bit_length())
            padded = [blocks + [0] * (width - len(blocks)) for blocks in self._lists]
            self._table = mx.array(padded, mx.int32)
        else:
            for i, (start, stop) in enumerate(zip(self._shown, lengths, strict=True)):
                if start < stop:
                    new = mx.array(self._lists[i][start:stop], mx.int32)
                    self._table[i, start:stop] = new
        self._shown = lengths
        return self._table


class _Blocks(BlockTable):
    """Blocks that the engine has given to a request."""

    def __del__(self) -> None:
        pass  # they are the engine's

    def extend(self, count: int) -> tuple[int, ...]:
        """The slots of ``count`` more tokens."""
        size, start = self.pool.layout.config.block_size, self.num_tokens
        self.num_tokens += count
        return tuple(
            self.blocks[i // size] * size + i % size for i in range(start, self.num_tokens)
        )

    def follow(self, segment: Segment) -> None:
        """Take over the engine's blocks, where they are enough, and those of new tokens are there.

        Raises:
            ValueError: they are not.
        """
        size, needed = self._block_size, segment.offset + segment.count
        if segment.offset < 0 or needed > len(segment.blocks) * size:
            raise ValueError(
                f"{len(segment.blocks)} blocks of {size} tokens for {segment.count} "
                f"tokens after {segment.offset}"
            )
        self.pool.check(segment.blocks[segment.offset // size : -(-needed // size)])
        self.hold(segment.blocks, segment.offset)


class _Batch(Sequences):
    """Requests whose tokens are stored and attended from together."""

    def __init__(
        self,
        pool: PagePool,
        centre: Centre | None,
        window: int,
        shown: KernelTables,
        tail: Tail,
        offsets: Sequence[int],
    ):
        super().__init__(pool, 0, centre=centre, window=window)
        self.tables = [_Blocks(pool) for _ in offsets]
        self.tail, self.offsets, self._by_index = tail, list(offsets), True
        self._shown = shown

    def follow(self, segments: Sequence[Segment]) -> None:
        """Go to where the segments begin; what a tail holds beyond that is forgotten."""
        for table, segment in zip(self.tables, segments, strict=True):
            cast(_Blocks, table).follow(segment)
        for i, segment in enumerate(segments):
            beyond = self.offsets[i] - segment.offset
            self.tail.lengths[i] = max(self.tail.lengths[i] - beyond, 0) if beyond >= 0 else 0
        self.offsets = [segment.offset for segment in segments]
        self._by_index = all(segment.by_index for segment in segments)

    def reread(self, segments: Sequence[Segment]) -> None:
        """Go to the last tokens of what is stored: those of the segments."""
        for table, segment in zip(self.tables, segments, strict=True):
            table.hold(segment.blocks, segment.offset + segment.count)
        self._columns = [slice(0, segment.count) for segment in segments]

    @property
    def block_table(self) -> mx.array:
        """The blocks as kernels take them: int32 ``(B, max_blocks)``, padded with zeros."""
        return self._shown.of([table.blocks for table in self.tables], self.pool)

    def _make_room(self, counts: list[int]) -> None:
        pass  # the engine has made it

    @property
    def _encoding(self) -> Centre | None:
        # Flags stand for a mean that is turned by the index of a token.
        return self.centre if self._by_index or not self.centre else self.centre.without_mu


class PagedLayer:
    """The compressed cache of one layer.

    Args:
        pool: its pages. Layers that the engine gives different blocks may share one.
        centre: calibration of the layer, or None.
        window: how many tokens a query sees, itself included; 0 is all.
        shown: block tables that it shares with other layers.
    """

    def __init__(
        self,
        pool: EnginePool,
        centre: Centre | None = None,
        window: int = 0,
        shown: KernelTables | None = None,
    ):
        self.pool = pool
        self.centre = centre
        self.window = window
        self._shown = shown or KernelTables()
        self._places: dict[str, tuple[_Batch, int]] = {}  # of each request, its batch and row

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        segments: Sequence[Segment],
        *,
        scale: float,
        sinks: mx.array | None = None,
        stored: bool = False,
    ) -> mx.array:
        """Store the new tokens of a packed batch and attend from them.

        Args:
            queries: ``(1, num_heads, T, head_dim)``, the T tokens of all segments.
            keys: ``(1, num_kv_heads, T, head_dim)``, after RoPE.
            values: the same shape.
            segments: which tokens are whose, in the order of their columns.
            scale: factor of the logits.
            sinks: a learned logit for each head, ``(num_heads,)``, or None.
            stored: another layer stored these tokens just now, the last of each request: they are
                attended from, and nothing is written.

        Returns:
            ``(1, num_heads, T, head_dim)`` in the queries' dtype.

        Raises:
            ValueError: the shapes do not fit, a block is not there, or an element cannot be
                encoded.
        """
        outputs = []
        for group in grouped(segments):
            batch = self._batch([segment.request for segment in group])
            q, k, v = (_unpacked(x, group) for x in (queries, keys, values))
            if stored:
                batch.reread(group)
            else:
                batch.follow(group)
                batch.store(k, v)
                batch.tail.settle()
            attended = batch.attend(q, k, v, scale=scale, mask="causal", sinks=sinks)
            outputs.append(_packed(attended))
        return mx.concatenate(outputs, axis=2) if outputs[1:] else outputs[0]

    @property
    def pending(self) -> list[mx.array]:
        """What a forward pass leaves to be evaluated, though no output may depend on it."""
        batches = {id(batch): batch for batch, _ in self._places.values()}.values()
        tails = [array for batch in batches for array in batch.tail.arrays or ()]
        return [self.pool.pages, *tails]

    def forget(self, requests: Iterable[str]) -> None:
        """These requests will not go on where they were."""
        for request in requests:
            self._places.pop(request, None)

    def _batch(self, requests: list[str]) -> _Batch:
        """The batch of these requests, in this order."""
        places = [self._places.get(request) for request in requests]
        batch = places[0] and places[0][0]
        if batch and places == [(batch, row) for row in range(len(batch))]:
            return batch
        tails = [place[0].tail.take([place[1]]) if place else Tail() for place in places]
        offsets = [place[0].offsets[place[1]] if place else 0 for place in places]
        batch = _Batch(
            self.pool, self.centre, self.window, self._shown, Tail.joined(tails), offsets
        )
        self._places |= {request: (batch, row) for row, request in enumerate(requests)}
        return batch


def grouped(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Segments that decode as many tokens each, one after the other, together; others alone."""
    groups = []
    for count, run in groupby(segments, lambda segment: segment.count):
        some = list(run)
        groups += [some] if count <= FEW else [[segment] for segment in some]
    return groups


def _unpacked(x: mx.array, segments: Sequence[Segment]) -> mx.array:
    """``(1, heads, T, D)`` -> ``(B, heads, L, D)`` of adjacent segments of L tokens."""
    x = x[:, :, segments[0].columns.start : segments[-1].columns.stop]
    return x.reshape(x.shape[1], len(segments), -1, x.shape[-1]).swapaxes(0, 1)


def _packed(x: mx.array) -> mx.array:
    """``(B, heads, L, D)`` -> ``(1, heads, B * L, D)``."""
    return x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[-1])
