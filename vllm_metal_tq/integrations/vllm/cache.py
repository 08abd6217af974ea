"""vllm-metal's cache with pages in place of its arrays, and the requests of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from vllm.logger import init_logger
from vllm_metal.attention.caches.kv_cache import MetalPagedKVCache

from ...centre import Centre
from ...config import TurboQuantConfig
from ...layout import PageLayout
from .paged import EnginePool, KernelTables, PagedLayer, Segment

logger = init_logger("vllm.vllm_metal_tq")


@dataclass(frozen=True)
class Layers:
    """What the layers of a cache are compressed with.

    Attributes:
        configs: the widths of each layer, None where it is not compressed.
        centres: the calibration of each layer, or None.
        block_size: tokens of a page.
    """

    configs: Sequence[TurboQuantConfig | None]
    centres: Sequence[Centre | None]
    block_size: int


class PagedCache(MetalPagedKVCache):
    """vllm-metal's cache with pages for the layers that are compressed.

    Attributes:
        compression: of its layers; set in a subclass, because vllm-metal makes the instances.
        layers: of each layer its compressed cache, None where it is vllm-metal's own.
    """

    compression: Layers

    def _allocate_dense_caches(self, dtype: mx.Dtype) -> None:
        self._blocks: dict[str, tuple[list[int], list[int]]] = {}  # the engine's, and ours
        self._shown = KernelTables()
        self.layers = [
            self._layer(i, config) if config else None
            for i, config in enumerate(self.compression.configs)
        ]
        shapes = zip(self.layers, self.kv_heads_per_layer, self.head_dim_per_layer, strict=True)
        for layer, heads, dim in shapes:
            shape = (0,) if layer else (self.num_blocks, self.block_size, heads, dim)
            self.key_caches.append(mx.zeros(shape, dtype))
            self.value_caches.append(mx.zeros(shape, dtype))
        mx.eval(*self.key_caches, *self.value_caches, *self.pending)

    def _layer(self, which: int, config: TurboQuantConfig) -> PagedLayer:
        layout = PageLayout(config, self.head_dim_per_layer[which])
        blocks = self.num_blocks * self._pages
        pool = EnginePool(layout, self.kv_heads_per_layer[which], blocks)
        window = max(self.sliding_window_per_layer[which], 0)  # theirs is -1 for none
        return PagedLayer(pool, self.compression.centres[which], window, self._shown)

    @property
    def _pages(self) -> int:
        """How many of our blocks one of the engine's is made of."""
        return int(self.block_size) // self.compression.block_size

    @property
    def _compressed(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if layer]

    @property
    def pending(self) -> list[mx.array]:
        """What a forward pass leaves to be evaluated, though no output may depend on it."""
        return [array for layer in self._compressed for array in layer.pending]

    def copy_blocks(self, block_copies: Sequence[tuple[int, int]]) -> None:
        """Copy the engine's blocks, ``(from, to)`` each, in all layers."""
        if not block_copies:
            return
        if any(not 0 <= block < self.num_blocks for pair in block_copies for block in pair):
            raise RuntimeError(f"no such blocks: {block_copies}; there are {self.num_blocks}")
        pairs = [
            (source * self._pages + i, target * self._pages + i)
            for source, target in block_copies
            for i in range(self._pages)
        ]
        for layer in self._compressed:
            layer.pool.copy_blocks(pairs)
        source, target = (mx.array(x, mx.int32) for x in zip(*block_copies, strict=True))
        for array in (*self.key_caches, *self.value_caches):
            if array.size:
                array[target] = array[source]

    def forget(self, requests: Iterable[str]) -> None:
        """These requests will not go on where they were."""
        for layer in self._compressed:
            layer.forget(requests)
        for request in requests:
            self._blocks.pop(request, None)

    def begin(self, requests: Iterable[str]) -> None:
        """A forward pass has tokens of these requests, in this order."""
        self._requests = list(requests)
        self._shown.begin()
        self._ends: dict[str, int] = {}  # of each request, where its tokens end in the batch

    def last(self, segments: Sequence[Segment], *packed: mx.array) -> list[mx.array]:
        """Of keys or values of a pass, ``(1, heads, T, D)``, those of the last tokens alone.

        Layers that read the pages of others may come after a choice of tokens, whose segments
        these are.
        """
        ends = ((self._ends[segment.request], segment.count) for segment in segments)
        chosen = mx.array([i for end, count in ends for i in range(end - count, end)])
        return [x[:, :, chosen] for x in packed]

    def segments(self, ctx: Any) -> list[Segment]:
        """The requests of a forward pass, with the blocks of the layers' pages."""
        if "turboquant" not in ctx.kernel_metadata_cache:  # which lasts as long as the pass
            ctx.kernel_metadata_cache["turboquant"] = self._segments(ctx)
        segments: list[Segment] = ctx.kernel_metadata_cache["turboquant"]
        return segments

    def _segments(self, ctx: Any) -> list[Segment]:
        """What each request adds. The tokens of a draft are listed one by one, or together."""
        group = self.group_index_for_layer(0)
        tables = ctx.kv_groups[group].block_tables if ctx.kv_groups else ctx.block_tables
        found: list[Segment] = []
        requests = iter(self._requests)
        for i, (offset, table) in enumerate(zip(ctx.offsets, tables, strict=True)):
            start, stop = ctx.cu_seqlens[i], ctx.cu_seqlens[i + 1]
            by_index = ctx.segment_positions is None or ctx.segment_positions[i] is None
            if i and offset == found[-1].offset + found[-1].count and table == tables[i - 1]:
                columns = slice(found[-1].columns.start, stop)
                by_index = by_index and found[-1].by_index
                found[-1] = replace(found[-1], columns=columns, by_index=by_index)
                continue
            request = next(requests)
            blocks = self._page_blocks(request, table)
            found.append(Segment(request, slice(start, stop), offset, blocks, by_index))
        self._ends = self._ends or {x.request: x.columns.stop for x in found}
        return found

    def _page_blocks(self, request: str, table: list[int]) -> list[int]:
        """Our blocks of a request: the list of its last step, made longer, where that is enough."""
        known, blocks = self._blocks.get(request, ([], []))
        if table[: len(known)] != known:
            known, blocks = [], []
        blocks += [b * self._pages + i for b in table[len(known) :] for i in range(self._pages)]
        self._blocks[request] = table, blocks
        return blocks

    def _log_dense_cache(self) -> None:
        total = sum(x.nbytes for x in self.key_caches + self.value_caches)
        total += sum(layer.pool.nbytes for layer in self._compressed)
        logger.info(
            "turboquant: %.1f MB of pages for %d layers, %d blocks of %d tokens",
            total / 1e6,
            self.num_layers,
            self.num_blocks,
            self.block_size,
        )
