"""vllm-metal's cache with pages in place of its arrays, and the requests of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
from vllm.logger import init_logger
from vllm_metal.attention.caches.kv_cache import MetalPagedKVCache

from ...centre import Centre
from ...config import TurboQuantConfig
from ...layout import PageLayout
from .paged import EnginePool, PagedLayer, Segment

logger = init_logger("vllm.vllm_metal_tq")


class Layers:
    """What the layers of a cache are compressed with.

    Args:
        configs: the widths of each layer, None where it is not compressed.
        centres: the calibration of each layer, or None.
    """

    def __init__(
        self, configs: Sequence[TurboQuantConfig | None], centres: Sequence[Centre | None]
    ):
        self.configs = configs
        self.centres = centres

    def pool(self, layer: int, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int):
        """Pages for ``num_blocks`` of the engine's blocks of ``block_size`` tokens."""
        layout = PageLayout(self.configs[layer], head_dim)
        return EnginePool(layout, num_kv_heads, num_blocks * pages_of(block_size, layout))


def pages_of(block_size: int, layout: PageLayout) -> int:
    """How many of our blocks one of the engine's is made of."""
    return block_size // layout.config.block_size


class PagedCache(MetalPagedKVCache):
    """vllm-metal's cache with pages for the layers that are compressed.

    Attributes:
        compression: of its layers; set in a subclass, because vllm-metal makes the instances.
        layers: of each layer its compressed cache, None where it is vllm-metal's own.
    """

    compression: Layers

    def _allocate_dense_caches(self, dtype: mx.Dtype) -> None:
        shapes = zip(self.kv_heads_per_layer, self.head_dim_per_layer, strict=True)
        pools = [
            config and self.compression.pool(i, self.num_blocks, *shape, self.block_size)
            for i, (config, shape) in enumerate(zip(self.compression.configs, shapes, strict=True))
        ]
        self._hold(pools)
        for pool, heads, dim in zip(
            pools, self.kv_heads_per_layer, self.head_dim_per_layer, strict=True
        ):
            shape = (0,) if pool else (self.num_blocks, self.block_size, heads, dim)
            self.key_caches.append(mx.zeros(shape, dtype))
            self.value_caches.append(mx.zeros(shape, dtype))
        mx.eval(*self.key_caches, *self.value_caches, *(p.pages for p in pools if p))

    def _allocate_layout_caches(self, layout, dtype: mx.Dtype) -> None:
        """Layers to which the engine gives different blocks share pages."""
        if None in self.compression.configs:
            raise NotImplementedError(
                "turboquant: layers without compression beside sliding windows in one model are "
                "not supported"
            )
        pools = {}
        for i, layer in enumerate(layout.layers):
            made = self.compression.pool(
                i, self.num_blocks, layer.num_kv_heads, layer.head_dim, layer.block_size
            )
            pool = pools.setdefault(layer.tensor_index, made)
            if pool.layout != made.layout or pool.num_kv_heads != made.num_kv_heads:
                raise NotImplementedError(
                    "turboquant: layers that share blocks must have the same widths"
                )
        self._hold([pools[layer.tensor_index] for layer in layout.layers])
        mx.eval([pool.pages for pool in pools.values()])

    def _hold(self, pools: list[EnginePool | None]) -> None:
        self.layers = [
            pool and PagedLayer(pool, centre, max(window, 0))
            for pool, centre, window in zip(
                pools, self.compression.centres, self.sliding_window_per_layer, strict=True
            )
        ]

    @property
    def _pools(self) -> list[EnginePool]:
        return list({id(layer.pool): layer.pool for layer in self.layers if layer}.values())

    def copy_blocks(self, block_copies: Sequence[tuple[int, int]]) -> None:
        """Copy the engine's blocks, ``(from, to)`` each, in all layers."""
        if not block_copies:
            return
        if any(not 0 <= block < self.num_blocks for pair in block_copies for block in pair):
            raise RuntimeError(f"no such blocks: {block_copies}; there are {self.num_blocks}")
        for pool in self._pools:
            pages = pages_of(self.block_size, pool.layout)
            pool.copy_blocks(
                (source * pages + i, target * pages + i)
                for source, target in block_copies
                for i in range(pages)
            )
        source, target = (mx.array(x, mx.int32) for x in zip(*block_copies, strict=True))
        for array in (*self.key_caches, *self.value_caches):
            if array.size:
                array[target] = array[source]

    def forget(self, requests: Iterable[str]) -> None:
        """These requests will not go on where they were."""
        for layer in filter(None, self.layers):
            layer.forget(requests)

    def segments(self, ctx, layer: int) -> list[Segment]:
        """The requests of a forward pass, with the blocks of a layer's pages."""
        group, layout = self.group_index_for_layer(layer), self.layers[layer].pool.layout
        key = group, layout.config.block_size, "turboquant"
        if key not in ctx.kernel_metadata_cache:
            tables, size = ctx.block_tables, self.block_size_for_layer(layer)
            if ctx.kv_groups is not None:
                tables, size = ctx.kv_groups[group].block_tables, ctx.kv_groups[group].block_size
            ctx.kernel_metadata_cache[key] = _segments(ctx, tables, pages_of(size, layout))
        return ctx.kernel_metadata_cache[key]

    def _log_dense_cache(self) -> None:
        total = sum(x.nbytes for x in (*self._pools, *self.key_caches, *self.value_caches))
        logger.info(
            "turboquant: %.1f MB of pages for %d layers, %d blocks of %d tokens",
            total / 1e6,
            self.num_layers,
            self.num_blocks,
            self.block_size,
        )

    def _log_layout_cache(self, layout) -> None:
        self._log_dense_cache()


def _segments(ctx, tables: list[list[int]], pages: int) -> list[Segment]:
    """What each request adds. vllm-metal lists the tokens of a draft one by one, or together."""
    found: list[Segment] = []
    requests = iter(ctx.turboquant_requests)
    for i, (offset, blocks) in enumerate(zip(ctx.offsets, tables, strict=True)):
        start, stop = ctx.cu_seqlens[i], ctx.cu_seqlens[i + 1]
        by_index = ctx.segment_positions is None or ctx.segment_positions[i] is None
        if i and blocks is tables[i - 1] and offset == found[-1].offset + found[-1].count:
            request, offset, start = found[-1].request, found[-1].offset, found[-1].columns.start
            by_index, expanded = by_index and found[-1].by_index, found.pop().blocks
        else:
            request = next(requests)
            expanded = [b * pages + j for b in blocks for j in range(pages)]
        found.append(Segment(request, slice(start, stop), offset, expanded, by_index))
    return found
