"""The compressed cache of one layer, with the methods that mlx_lm expects of a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Self, cast

import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
from mlx_lm.models.base import create_causal_mask

from ...attention import Mask
from ...centre import Centre
from ...config import TurboQuantConfig
from ...layout import PageLayout
from ...pages import PagePool
from ...sequences import Sequences
from ...tail import TAIL

STATE_VERSION = 4  # 3 had neither windows nor values of another head_dim


class WindowMask(mx.array):
    """bool ``(L, S + L)``: a chunk and the tokens before it, each seen within a window of them.

    An array, because mlx_lm's own caches of the model may be given it, too; ours know what it says
    by its type, and leave it to kernels, which take a window as a number.
    """

    window: int


class TurboQuantKVCache(host._BaseCache):
    """The keys and values of one layer, compressed in pages.

    It holds one sequence, or several that take every step together. ``update_and_fetch`` stores a
    chunk and hands it back as it came; the attention that follows (see ``hook``) goes through
    ``attend``. A deep copy is a fork: it shares the pages until one of the two writes.

    Args:
        pool: where the pages are, for all caches of the layer.
        centre: calibration of the layer, or None.
        max_kv_size: when more are stored, the oldest blocks but the first are dropped before the
            next chunk. None: no limit.
        window: how many tokens a query sees, itself included; 0 is all. What lies behind it is
            dropped, and ``max_kv_size`` does not matter.

    Attributes:
        sequences: what it holds.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        centre: Centre | None = None,
        max_kv_size: int | None = None,
        window: int = 0,
    ):
        least = 2 * pool.layout.config.block_size
        if max_kv_size is not None and max_kv_size < least:
            raise ValueError(f"max_kv_size {max_kv_size} is too few: at least {least} (two blocks)")
        limit = None if window else max_kv_size
        self.sequences = Sequences(pool, centre=centre, max_kv_size=limit, window=window)

    @classmethod
    def of(cls, sequences: Sequences) -> Self:
        """A cache that holds ``sequences``."""
        cache = cls.__new__(cls)
        cache.sequences = sequences
        return cache

    def __deepcopy__(self, memo: object) -> TurboQuantKVCache:
        other = copy.copy(self)
        other.sequences = self.sequences.take(range(len(self.sequences)))
        return other

    @property
    def pool(self) -> PagePool:
        """Where the pages are."""
        return self.sequences.pool

    @property
    def layout(self) -> PageLayout:
        """The layout of the pages."""
        return self.pool.layout

    @property
    def offset(self) -> int:
        """Tokens seen, which is the position of the next one."""
        return self.sequences.offsets[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store a chunk, and return it as it came.

        Args:
            keys: ``(B, num_kv_heads, L, head_dim)``.
            values: ``(B, num_kv_heads, L, v_head_dim)``.

        Raises:
            ValueError: the shapes do not fit, or an element cannot be encoded; nothing is stored.
                Layers before this one have stored the chunk: trim them by its length to go on.
            OutOfBlocks: the pool is full; nothing is stored, in no layer where all have pools
                with the same budget.
        """
        if self.empty() and keys.shape[0] > 1:  # the first chunk says how many sequences there are
            self.sequences = self.sequences.like(keys.shape[0])
        self.sequences.store(keys, values)
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend from a chunk that was just stored, to it and to all before it.

        Args:
            queries: ``(B, num_heads, L, head_dim)``.
            keys: ``(B, num_kv_heads, L, head_dim)``, as the model made them.
            values: ``(B, num_kv_heads, L, v_head_dim)``.
            scale: factor of the logits.
            mask: what ``make_mask`` made for this chunk.
            sinks: a learned logit for each head, ``(num_heads,)``, or None.

        Returns:
            ``(B, num_heads, L, v_head_dim)`` in the queries' dtype, zeros for padding.
        """
        if isinstance(mask, WindowMask) and mask.window == self.sequences.window:
            mask = "causal"
        return self.sequences.attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    def make_mask(
        self,
        N: int,  # noqa: N803 (mlx_lm's name)
        window_size: int | None = None,
        return_array: bool = False,
    ) -> Mask:
        """The mask of the next chunk of ``N`` tokens, over what the cache will still hold.

        ``window_size`` and ``return_array`` are mlx_lm's: how far back a token sees, and whether
        an array must be made where ``"causal"`` or None would do. With a window of its own the
        mask is that of mlx_lm's ``RotatingKVCache``.
        """
        if self.sequences.window:
            return self._window_mask(N, window_size or self.sequences.window, return_array)
        stored = max(self.sequences.stored_before(self._next_counts(N)))
        mask: Mask = host.create_attention_mask(N, stored, return_array, window_size)
        return mask

    def _window_mask(self, length: int, seen: int, return_array: bool) -> Mask:
        """The mask of a chunk after the last tokens of its window, of which so many are seen."""
        window = self.sequences.window
        stored = min(window - 1, max(self.sequences.offsets))
        if stored + length <= seen and not (return_array and length > 1):
            return None if length == 1 else "causal"
        mask: mx.array = create_causal_mask(length, stored, window_size=seen)
        if seen == window:
            mask = WindowMask(mask)
            mask.window = window
        return mask

    def _next_counts(self, length: int) -> list[int]:
        """Of each sequence, how many of the next ``length`` columns are tokens."""
        return [length] * len(self.sequences)

    @property
    def keys(self) -> mx.array:
        """An array that is evaluated with the cache.

        The models that mlx_lm runs as a pipeline make the keys of their last cache depend on what
        they send to the next process, so that it is sent although nobody there reads it.
        """
        arrays = self.sequences.tail.arrays
        return arrays[0] if arrays else self.pool.pages

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        tail = self.sequences.tail
        if tail.arrays:
            tail.arrays = keys, tail.arrays[1]
        else:
            self.pool.pages = keys

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
        return self.sequences.offsets == self.sequences.lengths

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, or all where there are fewer; returns how many.

        Raises:
            ValueError: what the tokens before them see was dropped; nothing is forgotten.
        """
        n = max(min(*self.sequences.lengths, n), 0)
        self.sequences.trim(n)
        return n

    def size(self) -> int:
        """Tokens stored, of the longest sequence."""
        return max(self.sequences.lengths)

    def empty(self) -> bool:
        """Whether no token was seen yet."""
        return not any(self.sequences.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and the tail, those of blocks that other caches share included."""
        return self.sequences.nbytes

    def filter(self, batch_indices: mx.array | Iterable[int]) -> None:
        """Keep only the sequences with these indices, in their order."""
        self.sequences.keep(_indices(batch_indices))

    def extract(self, idx: int) -> TurboQuantKVCache:
        """One sequence, as a cache of its own that shares the blocks."""
        return TurboQuantKVCache.of(self.sequences.take([idx]))

    @staticmethod
    def merge(caches: list[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """The sequences of all ``caches`` as a batch. Blocks are shared, no page is copied.

        Only caches whose layer has another pool than the first with a budget, or the first, are
        copied to that one.

        Raises:
            ValueError: the caches differ in more than their tokens; see ``Sequences.extend``.
        """
        pools = [cache.pool for cache in caches]
        limited = [pool for pool in pools if pool.max_blocks is not None]
        batch = caches[0].sequences.like(0, (limited or pools)[0])
        for cache in caches:
            batch.extend(cache.sequences)
        return BatchTurboQuantKVCache.of(batch)

    def compacted(self) -> TurboQuantKVCache:
        """A copy with a pool of its own, which holds nothing else: what is to be saved."""
        sequences = self.sequences.like(0, PagePool(self.layout, self.pool.num_kv_heads))
        sequences.extend(self.sequences)
        return self.of(sequences)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The pages, one int32 array of numbers, the tail's two arrays, the centre's four.

        The last two parts are there where the cache has them, the numbers where it holds one
        sequence: several cannot be saved.
        """
        some, pages = self.sequences, self.pool.pages
        tail = some.tail.arrays if some.tail.arrays else ()
        if len(some) != 1:
            return pages, *tail
        if self.pool.num_used > len(some.tables[0].blocks):
            return self.compacted().state  # nobody else's pages
        header = [
            STATE_VERSION,
            self.layout.config.k_width,
            self.layout.config.v_width,
            self.layout.config.block_size,
            self.layout.head_dim,
            self.pool.num_kv_heads,
            some.max_kv_size or 0,
            some.window,
            some.offsets[0],
            some.lengths[0],
            some.tail.lengths[0],
            int(some.centre is not None),
            self.layout.v_head_dim,
        ]
        # An empty array cannot be saved, so an empty pool passes for one free block.
        if not self.pool.num_blocks:
            pages = mx.zeros((1, *pages.shape[1:]), mx.uint8)
        tail = tail if some.tail.lengths[0] else ()
        centre = some.centre.arrays if some.centre else ()
        return pages, mx.array(header + some.tables[0].blocks, mx.int32), *tail, *centre

    @state.setter
    def state(self, state: tuple[mx.array, ...]) -> None:
        self.sequences = self.from_state(state).sequences

    @classmethod
    def from_state(cls, state: Sequence[mx.array], meta_state: object = None) -> TurboQuantKVCache:
        """Rebuild a cache from its ``state``; mlx_lm before 0.32 passes an empty ``meta_state``.

        Raises:
            ValueError: ``state`` is of another version, or its parts contradict each other.
        """
        pages, header, *rest = state
        numbers = _numbers(header)
        k_width, v_width, block_size, head_dim, num_kv_heads, max_kv_size, window = numbers[:7]
        offset, count, tail_length, centred, v_head_dim, *blocks = numbers[7:]
        config = TurboQuantConfig(k_width, v_width, block_size)
        pool = PagePool(PageLayout(config, head_dim, v_head_dim), num_kv_heads)
        cache = cls(pool, max_kv_size=max_kv_size or None, window=window)
        tail = rest[: 2 if tail_length else 0]
        fits = (
            pages.dtype == mx.uint8
            and pages.shape[1:] == pool.pages.shape[1:]
            and len(set(blocks)) == len(blocks) == -(-count // block_size)
            and all(0 <= block < pages.shape[0] for block in blocks)
            and 0 <= count <= offset
            and (count == offset or max_kv_size or window)
            and window >= 0
            and count >= min(window - 1, offset)
            and 0 <= tail_length <= min(count, TAIL)
            and centred in (0, 1)
            and len(rest) == (2 if tail_length else 0) + 4 * centred
            and all(x.shape == (1, num_kv_heads, TAIL, head_dim) for x in tail)
            and all(mx.issubdtype(x.dtype, mx.floating) for x in tail)
        )
        if not fits:
            raise ValueError(f"pages {pages.shape} do not fit their header {header[:11].tolist()}")
        scales = pool.layout.split(pages)[-1].view(mx.float16)
        if not mx.isfinite(scales).all().item():
            raise ValueError("pages hold scales that are not finite")
        if not all(mx.isfinite(x).all().item() for x in tail):
            raise ValueError("the tail holds elements that are not finite")
        some = cache.sequences
        if centred:
            some.centre = Centre.from_arrays(rest[-4:], num_kv_heads, head_dim)
        if tail:
            some.tail.arrays, some.tail.lengths = (tail[0], tail[1]), [tail_length]
        pool.adopt(pages, blocks)
        some.tables[0].hold(blocks, count)
        some.offsets = [offset]
        return cache


class BatchTurboQuantKVCache(TurboQuantKVCache):
    """Sequences of one layer that join and leave at any step, as mlx_lm's BatchGenerator asks.

    Padding is never stored: of each chunk only the columns that are tokens. ``merge`` makes it of
    caches; ``pool``, ``centre``, ``max_kv_size`` and ``window`` are those of ``TurboQuantKVCache``.
    """

    _left: Sequence[int] = ()  # of each sequence, padding still to come before its first token
    _right: Sequence[int] = ()  # of each sequence, tokens still to come before padding

    @property
    def offset(self) -> mx.array:  # type: ignore[override]  # what models take for a batch
        """The position of each sequence's next column: int32 ``(B,)``."""
        left = self._left or [0] * len(self.sequences)
        return _positions(*(o - n for o, n in zip(self.sequences.offsets, left, strict=True)))

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding of the chunks that follow, as mlx_lm's ``BatchKVCache`` takes it.

        Args:
            left_padding: of each sequence, columns before its tokens.
            lengths: of each sequence, tokens before ``right_padding``.
            right_padding: of each sequence, columns after its tokens.
        """
        if left_padding is not None:
            if not self.empty() or right_padding is not None:
                raise ValueError("left padding comes alone, and while nothing is stored")
            self._left = [int(n) for n in left_padding]
        if right_padding is not None and max(right_padding) > 0:
            self._right = [int(n) for n in lengths or ()]

    def finalize(self) -> None:
        """The padding that was announced has come."""
        self._right = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the tokens of a chunk, and return it as it came, padding included.

        Args:
            keys: ``(B, num_kv_heads, L, head_dim)``.
            values: ``(B, num_kv_heads, L, v_head_dim)``.

        Raises:
            ValueError: as for ``TurboQuantKVCache``.
            OutOfBlocks: likewise.
        """
        columns = self._next_columns(keys.shape[2])
        self.sequences.store(keys, values, columns)
        self._left = [n - x.start for n, x in zip(self._left, columns, strict=False)]
        self._left = self._left if any(self._left) else []
        self._right = [n - x.stop for n, x in zip(self._right, columns, strict=False)]
        return keys, values

    def _next_columns(self, length: int) -> list[slice]:
        """Of each sequence, which of the next ``length`` columns are tokens."""
        count = len(self.sequences)
        starts = [min(n, length) for n in self._left or [0] * count]
        ends = [min(n, length) for n in self._right or [length] * count]
        return list(map(slice, starts, ends))

    def _next_counts(self, length: int) -> list[int]:
        return [x.stop - x.start for x in self._next_columns(length)]

    def filter(self, batch_indices: mx.array | Iterable[int]) -> None:
        """Keep only the sequences with these indices, in their order."""
        which = _indices(batch_indices)
        self._left, self._right = (
            [x[i] for i in which] if x else [] for x in (self._left, self._right)
        )
        super().filter(which)

    def extend(self, other: BatchTurboQuantKVCache) -> None:
        """Let the sequences of ``other`` join.

        Raises:
            ValueError: padding was announced and has not come, or see ``Sequences.extend``.
        """
        if any(map(len, (self._left, self._right, other._left, other._right))):
            raise ValueError("a batch that waits for padding cannot be joined, nor join")
        self.sequences.extend(other.sequences)


def _indices(batch_indices: mx.array | Iterable[int]) -> list[int]:
    given = np.array(batch_indices) if isinstance(batch_indices, mx.array) else batch_indices
    return [int(i) for i in given]


@lru_cache(maxsize=4)  # layers share them
def _positions(*offsets: int) -> mx.array:
    return mx.array(offsets, mx.int32)


def _numbers(header: mx.array) -> list[int]:
    """The numbers of a header after its version, as this version has them."""
    if header.dtype != mx.int32 or header.ndim != 1 or not header.size:
        raise ValueError(f"header {header.dtype} {header.shape} is none of a cache")
    version, *numbers = cast(list[int], header.tolist())
    if version == 3:
        numbers[6:6] = [0]
        numbers[11:11] = numbers[3:4]
    elif version != STATE_VERSION:
        raise ValueError(f"state version {version} is unknown: 3 and {STATE_VERSION} can be read")
    if len(numbers) < 12:
        raise ValueError(f"header {header.dtype} {header.shape} is none of a cache")
    return numbers
