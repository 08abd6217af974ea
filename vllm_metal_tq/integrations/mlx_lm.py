"""The compressed cache as one of mlx_lm's prompt caches.

``mlx_lm.generate(model, tokenizer, prompt, prompt_cache=make_prompt_cache(model))`` is all that a
script changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
from mlx.utils import tree_flatten

from .. import attention, codec
from ..config import TurboQuantConfig
from ..layout import PageLayout
from ..pages import BlockTable, PagePool
from . import mlx_lm_hook as hook

STATE_VERSION = 1


class TurboQuantKVCache(host._BaseCache):
    """The keys and values of one layer of one sequence, compressed in pages.

    ``update_and_fetch`` stores a chunk and hands it back as it came; the attention that follows
    (see ``mlx_lm_hook``) reads everything older from the pages.

    Args:
        config: widths and block size.
        head_dim: elements of a key and of a value.
        num_kv_heads: KV heads of the layer.
        max_tokens: when more are stored, the oldest blocks but the first are dropped before the
            next chunk. None: no limit.
        raw_window: for measuring quality. When set, a query sees only its last ``raw_window``
            tokens, itself included, as they came, whatever the chunk; 1 is plain decoding.

    Attributes:
        offset: tokens seen, which is the position of the next one.
    """

    def __init__(
        self,
        config: TurboQuantConfig,
        head_dim: int,
        num_kv_heads: int,
        max_tokens: int | None = None,
        raw_window: int | None = None,
    ):
        least = 2 * config.block_size
        if max_tokens is not None and max_tokens < least:
            raise ValueError(f"max_tokens {max_tokens} is too few: at least {least} (two blocks)")
        self.config = config
        self.max_tokens = max_tokens
        self.raw_window = raw_window
        self.offset = 0
        self.layout = PageLayout(config, head_dim)
        self.pool = PagePool(self.layout, num_kv_heads)
        self.table = BlockTable(self.pool)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store a chunk, ``(1, num_kv_heads, L, head_dim)`` each, and return it as it came.

        Raises:
            ValueError: the shapes do not fit, or an element cannot be encoded; nothing is stored.
        """
        if keys.ndim != 4 or keys.shape[:2] != (1, self.pool.num_kv_heads):
            raise ValueError(
                f"keys {keys.shape} do not fit: this cache holds one sequence of "
                f"{self.pool.num_kv_heads} KV heads, (1, {self.pool.num_kv_heads}, L, head_dim)"
            )
        rows = codec.encode(keys[0], values[0], self.layout)
        length = keys.shape[2]
        self.table.evict(self._excess(length))
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
        """Attend from a chunk that was just stored; see ``attention.attend``."""
        length = keys.shape[2]
        past_length = self.table.num_tokens - length
        if self.raw_window is not None:
            mask = attention.decode_mask(mask, length, past_length, self.raw_window)
            past_length += length
        past = codec.decode(self.table.read(past_length)[None], self.layout)
        return attention.attend(queries, keys, values, past, scale=scale, mask=mask, sinks=sinks)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):  # noqa: N803 (mlx_lm's name)
        """The mask of the next chunk of ``N`` tokens, over what the cache will still hold."""
        stored = self.table.num_tokens - self.table.evictable(self._excess(N))
        return host.create_attention_mask(N, stored, return_array, window_size)

    def _excess(self, length: int) -> int:
        if self.max_tokens is None:
            return 0
        return max(self.table.num_tokens + length - self.max_tokens, 0)

    def is_trimmable(self) -> bool:
        """Whether ``trim`` can restore an earlier state: not once tokens were dropped."""
        return self.offset == self.table.num_tokens

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, or all where there are fewer; returns how many."""
        n = min(self.table.num_tokens, n)
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
        return self.pool.num_blocks * self.pool.num_kv_heads * self.layout.bf16_page_bytes()

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
            self.max_tokens or 0,
            self.offset,
            self.table.num_tokens,
        ]
        # An empty array cannot be saved, so an empty pool passes for one free block.
        pages = self.pool.pages
        if not self.pool.num_blocks:
            pages = mx.zeros((1, *pages.shape[1:]), mx.uint8)
        return pages, mx.array(header + self.table.blocks, mx.int32)

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
        k_bits, v_bits, block_size, head_dim, num_kv_heads, max_tokens, offset, count = numbers[:8]
        config = TurboQuantConfig(k_bits, v_bits, block_size)
        cache = cls(config, head_dim, num_kv_heads, max_tokens or None)
        blocks = numbers[8:]
        fits = (
            pages.shape[1:] == cache.pool.pages.shape[1:]
            and len(set(blocks)) == len(blocks) == -(-count // block_size)
            and all(0 <= block < pages.shape[0] for block in blocks)
            and 0 <= count <= offset
        )
        if not fits:
            raise ValueError(f"pages {pages.shape} do not fit their header {header.tolist()}")
        cache.pool.adopt(pages, blocks)
        cache.table.blocks, cache.table.num_tokens = blocks, count
        cache.offset = offset
        return cache


@dataclass(frozen=True)
class CacheReport:
    """What a prompt cache holds.

    Attributes:
        layers: caches in the prompt cache.
        layers_compressed: how many of them are compressed.
        kv_bytes: bytes allocated, the other caches included.
        kv_bytes_bf16: the same with bf16 in place of the compressed caches.
    """

    layers: int
    layers_compressed: int
    kv_bytes: int
    kv_bytes_bf16: int

    @property
    def ratio(self) -> float:
        """How many times smaller the cache is than with bf16."""
        return self.kv_bytes_bf16 / self.kv_bytes if self.kv_bytes else 1.0


def report(prompt_cache: list) -> CacheReport:
    """Add up what ``prompt_cache`` holds."""
    ours = [c for c in prompt_cache if isinstance(c, TurboQuantKVCache)]
    others = [c for c in prompt_cache if not isinstance(c, TurboQuantKVCache)]
    arrays = (x for c in others for _, x in tree_flatten(c.state) if isinstance(x, mx.array))
    dense = sum(x.nbytes for x in arrays)
    return CacheReport(
        layers=len(prompt_cache),
        layers_compressed=len(ours),
        kv_bytes=dense + sum(c.nbytes for c in ours),
        kv_bytes_bf16=dense + sum(c.nbytes_bf16 for c in ours),
    )


def make_prompt_cache(
    model: nn.Module,
    config: TurboQuantConfig | None = None,
    max_kv_size: int | None = None,
) -> list:
    """Make a prompt cache for ``mlx_lm.generate``, ``stream_generate`` and chat.

    Layers of plain attention get a ``TurboQuantKVCache``; the others (sliding window, SSM, MLA,
    layers that share their keys) keep the cache that mlx_lm gives them.

    Args:
        model: a model that mlx_lm has loaded.
        config: widths; ``TurboQuantConfig.from_names()``, the default preset, where None.
        max_kv_size: tokens that a layer keeps, as mlx_lm's flag of that name: beyond it the
            oldest blocks but the first are dropped.

    Raises:
        ValueError: a head_dim cannot be rotated, or ``max_kv_size`` is below two blocks.
    """
    config = config or TurboQuantConfig.from_names()
    hook.install(model, TurboQuantKVCache)
    caches = host.make_prompt_cache(model, max_kv_size)
    return [
        cache if shape is None else TurboQuantKVCache(config, *shape, max_tokens=max_kv_size)
        for cache, shape in zip(caches, _plain_attention(model), strict=True)
    ]


def save_prompt_cache(file_name: str, prompt_cache: list, metadata: dict | None = None) -> None:
    """Save ``prompt_cache`` with ``metadata`` (strings), as ``mlx_lm.models.cache`` does."""
    host.save_prompt_cache(str(file_name), prompt_cache, metadata or {})


def load_prompt_cache(file_name: str, model: nn.Module) -> list:
    """Load what ``save_prompt_cache`` wrote, for use with ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no prompt cache, or belongs to another model.
    """
    if not Path(file_name).is_file():
        raise FileNotFoundError(f"prompt cache {str(file_name)!r}: no such file")
    hook.install(model, TurboQuantKVCache)
    try:
        prompt_cache = host.load_prompt_cache(str(file_name))
        mx.eval([cache.state for cache in prompt_cache])  # reads the file to its end
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"prompt cache {str(file_name)!r} is damaged or foreign: {e}") from e
    expected = [_signature(cache) for cache in make_prompt_cache(model)]
    if [_signature(cache) for cache in prompt_cache] != expected:
        raise ValueError(f"prompt cache {str(file_name)!r} was made by another model")
    return prompt_cache


def _signature(cache) -> tuple:
    if isinstance(cache, TurboQuantKVCache):
        return (cache.layout.head_dim, cache.pool.num_kv_heads)
    return (type(cache).__name__,)


class _Probe(host.KVCache):
    """A dense cache that records how a layer uses it."""

    def __init__(self):
        super().__init__()
        self.updates: list[tuple] = []
        self.attentions: list[tuple] = []

    def update_and_fetch(self, keys, values):
        self.updates.append((keys.shape, values.shape))
        return super().update_and_fetch(keys, values)

    def attend(self, queries, keys, values, scale, mask, sinks):
        self.attentions.append((queries.shape, keys.shape, values.shape))
        return hook.dense_attention(queries, keys, values, None, scale, mask, sinks)

    def shape(self) -> tuple[int, int] | None:
        """(head_dim, num_kv_heads) where the layer is plain attention, else None."""
        if len(self.updates) != 1 or len(self.attentions) != 1:
            return None
        (stored, stored_values), (queries, keys, values) = self.updates[0], self.attentions[0]
        if not stored == stored_values == keys == values or queries[3] != keys[3]:
            return None
        return keys[3], keys[1]


def _plain_attention(model: nn.Module) -> list[tuple[int, int] | None]:
    """(head_dim, num_kv_heads) of each of the model's caches, None where it cannot be replaced.

    Found by building the graph of one token and never evaluating it: a layer qualifies if it
    stores keys and values of one shape once and attends to them once.
    """
    caches = host.make_prompt_cache(model)
    probes = [_Probe() if type(cache) is host.KVCache else cache for cache in caches]
    model(mx.zeros((1, 1), mx.int32), cache=probes)
    return [probe.shape() if isinstance(probe, _Probe) else None for probe in probes]
