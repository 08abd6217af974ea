"""The page pools of a model: one for each compressed layer, shared by all of its prompt caches."""

from __future__ import annotations

import copy

import mlx.nn as nn

from ...calibration import Calibration
from ...centre import Centre
from ...config import TurboQuantConfig
from ...layout import PageLayout
from ...pages import PagePool
from ...part import Part
from ...types import PromptCache
from . import hook
from .cache import TurboQuantKVCache
from .fetched import FetchedKVCache, SharedKVCache
from .measure import from_biases
from .parts import all_compressed, with_keys
from .probe import Attention, Reader, attention

CLASSES: dict[Reader, type[TurboQuantKVCache]] = {
    Reader.ITSELF: TurboQuantKVCache,
    Reader.LAYERS: SharedKVCache,
    Reader.CODE: FetchedKVCache,
}


class CachePools:
    """Where all sequences of a model keep their pages.

    Prompt caches made here can be batched by mlx_lm, and copied, without a page being copied.
    Layers that keep keys and values are compressed, those with a sliding window in a ring of
    blocks; the others (SSM, MLA) keep the cache that mlx_lm gives them, which no budget counts.

    Args:
        model: a model that mlx_lm has loaded.
        config: widths; where None those of the calibration, if it has any, or else the default
            preset.
        max_kv_size: tokens that a layer keeps, as mlx_lm's flag of that name: beyond it the
            oldest blocks but the first are dropped. A layer with a window keeps that.
        calibration: what ``calibrate`` measured or ``calibration.load`` read. None: the bias of
            k_proj serves where a layer has one.
        max_bytes: the most that the pages of all layers without a window may take. None: no
            limit. What would need more raises ``OutOfBlocks``, in the first such layer, before
            any has stored anything; layers with a window, or not compressed, may have, and then
            their prompt cache is of no more use. Not counted is what does not grow with a
            sequence: windows, and the last tokens as they came, ``TAIL`` of each sequence.

    Raises:
        ValueError: a head_dim cannot be rotated, ``max_kv_size`` is below two blocks,
            ``max_bytes`` below one block, the calibration is of a model of another shape, or the
            config names a layer that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TurboQuantConfig | None = None,
        *,
        max_kv_size: int | None = None,
        calibration: Calibration | None = None,
        max_bytes: int | None = None,
    ):
        config = config or (calibration and calibration.config) or TurboQuantConfig.from_names()
        hook.install(model)
        layers = attention(model)
        shapes = [x.shape if isinstance(x, Attention) else None for x in layers]
        part = Part.of(model, len(shapes))
        centres = part.centres(calibration.centres) if calibration else from_biases(model).centres
        if not all(map(_fits, centres, shapes)):
            raise ValueError("the calibration was measured on a model of another shape")
        config = part.config(config)
        self.model = model
        self.block_size = config.block_size
        self.max_bytes = max_bytes
        self._caches = hook.host_caches(model, max_kv_size)
        for i, (layer, centre) in enumerate(zip(layers, centres, strict=True)):
            if isinstance(layer, Attention):
                layout = PageLayout(config.for_layer(i), layer.head_dim, layer.v_head_dim)
                pool = PagePool(layout, layer.num_kv_heads)
                cache = CLASSES[layer.reader](
                    pool, centre=centre, max_kv_size=max_kv_size, window=layer.window
                )
                self._caches[i] = with_keys(self._caches[i], cache)
        for pool in self._growing:
            pool.max_blocks = self.max_blocks

    @property
    def pools(self) -> list[PagePool]:
        """The pools of the compressed layers, in order."""
        return [cache.pool for cache in all_compressed(self._caches)]

    @property
    def _growing(self) -> list[PagePool]:
        """The pools of layers without a window, which all hold as many blocks."""
        ours = all_compressed(self._caches)
        return [cache.pool for cache in ours if not cache.sequences.window]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers without a window together."""
        return sum(pool.block_bytes for pool in self._growing)

    @property
    def max_blocks(self) -> int | None:
        """The most blocks that a layer without a window may have, or None."""
        if self.max_bytes is None or not self._growing:
            return None
        if self.max_bytes < self.block_bytes:
            raise ValueError(
                f"max_bytes {self.max_bytes} is too few: one block of {self.block_size} tokens "
                f"takes {self.block_bytes}"
            )
        return self.max_bytes // self.block_bytes

    @property
    def num_blocks(self) -> int:
        """Blocks allocated in each layer without a window, in use or free."""
        return max((pool.num_blocks for pool in self._growing), default=0)

    @property
    def used_blocks(self) -> int:
        """Blocks of a layer without a window that sequences hold; shared ones count once."""
        return max((pool.num_used for pool in self._growing), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for pages, in all layers."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that sequences hold, in all layers."""
        return sum(pool.num_used * pool.block_bytes for pool in self.pools)

    def make_prompt_cache(self) -> PromptCache:
        """A prompt cache of one new sequence, as ``mlx_lm.generate`` and batches take it."""
        return copy.deepcopy(self._caches)

    def attach(self) -> None:
        """Let mlx_lm's own ``make_prompt_cache(model)``, batches and server use these pools.

        They take the place of pools that were attached to the model before.
        """
        self.model.make_cache = self.make_prompt_cache

    def detach(self) -> None:
        """Undo ``attach``."""
        vars(self.model).pop("make_cache", None)


def _fits(centre: Centre | None, shape: tuple[int, int] | None) -> bool:
    return centre is None or (shape is not None and centre.mu.shape == shape[::-1])
