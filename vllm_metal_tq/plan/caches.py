"""Bytes that a cache takes for so many sequences of so many tokens, in each engine.

Whole blocks are counted, the last tokens that are kept as they came, windows and states. Two
engines allocate differently: mlx_lm, whose layers each have a cache of their own, and vLLM, whose
layers take blocks of one pool in turns.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..config import TurboQuantConfig
from ..layout import PageLayout
from ..tail import TAIL
from .models import Layer, Model

MLX_STEP = 256  # tokens by which mlx_lm's caches grow
MLX_GROUP = 64  # elements that share a scale and a bias in its quantised cache, 2 bytes each
VLLM_BLOCK = 16  # tokens
VLLM_CHUNK = 2048  # tokens of a batch, --max-num-batched-tokens


class Unsupported(ValueError):  # noqa: N818 (its name says what it is)
    """An engine does not offer this cache for this model."""


@dataclass(frozen=True)
class Scheme:
    """How keys and values are stored.

    Attributes:
        name: as tables have it.
        config: widths of compressed pages, or None.
        mlx_bits: of mlx_lm's ``QuantizedKVCache``, or None.
    """

    name: str
    config: TurboQuantConfig | None = None
    mlx_bits: int | None = None

    def token_bytes(self, layer: Layer) -> int:
        """Bytes of one token in one layer that this scheme is applied to."""
        if self.config is not None:
            return layer.kv_heads * PageLayout(self.config, layer.key_dim).row_bytes
        if self.mlx_bits is not None:
            dims = layer.key_dim + layer.value_dim
            return layer.kv_heads * (dims * self.mlx_bits // 8 + 4 * dims // MLX_GROUP)
        return layer.bf16_token_bytes

    def tail_bytes(self, layer: Layer) -> int:
        """Bytes of the last tokens of a sequence as they came, in one layer."""
        return TAIL * layer.bf16_token_bytes if self.config is not None else 0


class Cache(Protocol):
    """The cache of a model in one engine and scheme."""

    token_bytes: int
    """What one more token takes where all windows are full, blocks aside."""

    def nbytes(self, tokens: int, sequences: int = 1) -> int:
        """Bytes for so many sequences of so many tokens each."""


@dataclass(frozen=True)
class MlxCache:
    """mlx_lm's caches, ours in the place of those that can be compressed.

    Ours are allocated by the block within ``serve --kv-budget``; without a budget they grow by an
    eighth at a time.

    Raises:
        Unsupported: mlx_lm has no quantised cache for this model.
    """

    model: Model
    scheme: Scheme

    def __post_init__(self):
        if self.scheme.mlx_bits is None:
            return
        if any(layer.window for layer in self.model.layers):
            raise Unsupported("mlx_lm quantises no sliding windows")
        if any(layer.shared for layer in self.model.layers):
            raise Unsupported("mlx_lm quantises no caches that layers share")
        for layer in self.model.layers:
            if layer.kv_heads and not layer.is_attention:
                raise Unsupported("mlx_lm quantises no latents")
            if layer.key_dim % MLX_GROUP:
                raise Unsupported(f"mlx_lm quantises no head_dim of {layer.key_dim}")

    def compresses(self, layer: Layer) -> bool:
        """Whether this layer's cache is ours."""
        plain = layer.is_attention and not layer.window and not layer.shared
        return self.scheme.config is not None and plain

    @property
    def num_compressed(self) -> int:
        """Layers whose cache is ours."""
        return sum(map(self.compresses, self.model.layers))

    @cached_property
    def token_bytes(self) -> int:
        """See ``Cache``."""
        return sum(map(self._token_bytes, (la for la in self.model.layers if not la.window)))

    def _token_bytes(self, layer: Layer) -> int:
        if self.scheme.mlx_bits is not None or self.compresses(layer):
            return self.scheme.token_bytes(layer)
        return layer.bf16_token_bytes

    def nbytes(self, tokens: int, sequences: int = 1) -> int:
        """See ``Cache``."""
        each = Counter(self.model.layers)  # few kinds of many layers
        return sequences * sum(n * self._layer_bytes(la, tokens) for la, n in each.items())

    def _layer_bytes(self, layer: Layer, tokens: int) -> int:
        ours = self.compresses(layer)
        kept = _rounded(tokens, self.scheme.config.block_size if ours else MLX_STEP)
        if layer.window:
            kept = min(kept, layer.window)
        tail = self.scheme.tail_bytes(layer) if ours and tokens else 0
        return layer.state_bytes + kept * self._token_bytes(layer) + tail


@dataclass(frozen=True)
class _Group:
    """Layers that share a block table in vLLM: as many as take one block together."""

    window: int
    is_state: bool
    block_size: int

    def blocks(self, tokens: int, chunk: int) -> int:
        """The most blocks that a sequence of so many tokens holds at a time."""
        if self.is_state:
            return 1
        if not self.window:
            return -(-tokens // self.block_size)
        # A window may begin within a block: hence one more.
        return -(-min(self.window - 1 + chunk, tokens) // self.block_size) + 1


@dataclass(frozen=True)
class VllmCache:
    """Blocks as vLLM's planner divides a budget into them; with the plugin, of compressed pages.

    Layers of one kind (full attention, a window, a state) are split into groups of as many layers,
    which take blocks of one pool in turns; a block is as large as the layers of a group. Where
    layers of different kinds have pages of different sizes, smaller ones hold more tokens.

    Raises:
        Unsupported: the plugin refuses the model, or its layers are planned in another way.
    """

    model: Model
    scheme: Scheme
    chunk: int = VLLM_CHUNK

    def __post_init__(self):
        if self.scheme.mlx_bits is not None:
            raise Unsupported("vLLM does not offer it")
        compressed = self.scheme.config is not None
        if compressed and any(la.kv_heads and not la.is_attention for la in self.model.layers):
            raise Unsupported("the plugin refuses latents (MLA)")
        if compressed and any(layer.shared for layer in self.model.layers):
            raise Unsupported("the plugin refuses layers that read the cache of others")
        sizes = set(map(self.scheme.token_bytes, self._attention))
        if not self._is_uniform and compressed and len(sizes) > 1:
            raise Unsupported("the plugin refuses windows beside full attention of another size")
        if not self._is_uniform and any(max(sizes) % size for size in sizes):
            raise Unsupported("layers of several kinds and sizes: vLLM's plan is not modelled")

    @property
    def _attention(self) -> list[Layer]:
        return [layer for layer in self.model.layers if layer.kv_heads]

    @property
    def _is_uniform(self) -> bool:
        """Whether all layers keep as many tokens: vLLM puts them into one group then."""
        return len({(layer.window, layer.state_bytes > 0) for layer in self.model.layers}) == 1

    @cached_property
    def block_size(self) -> int:
        """Tokens of a block of the layer with the largest pages, which cover a state."""
        state = max((layer.state_bytes for layer in self.model.layers), default=0)
        return max(_rounded(-(-state // self._widest), VLLM_BLOCK), VLLM_BLOCK)

    @property
    def _widest(self) -> int:
        """The most bytes of a token in one layer."""
        return max(map(self.scheme.token_bytes, self._attention))

    @cached_property
    def _groups(self) -> tuple[list[_Group], int]:
        """The groups, and how many layers the largest has."""
        if self._is_uniform:
            return [_Group(self.model.layers[0].window, False, self.block_size)], 1
        counts = Counter(map(self._group, self.model.layers))
        size = min(counts.values())
        if max(counts.values()) < 1.5 * size:  # vLLM's rule: better to leave a few places empty
            size = max(counts.values())
        numbers = {group: -(-count // size) for group, count in counts.items()}
        largest = max(-(-counts[group] // number) for group, number in numbers.items())
        return [group for group, number in numbers.items() for _ in range(number)], largest

    def _group(self, layer: Layer) -> _Group:
        if layer.state_bytes:
            return _Group(0, True, self.block_size)
        fewer = self._widest // self.scheme.token_bytes(layer)
        return _Group(layer.window, False, self.block_size * fewer)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers that share it."""
        if self._is_uniform:
            return self.block_size * sum(map(self.scheme.token_bytes, self._attention))
        return self.block_size * self._groups[1] * self._widest

    @cached_property
    def tail_bytes(self) -> int:
        """Bytes outside of blocks for each sequence: its last tokens as they came."""
        return sum(map(self.scheme.tail_bytes, self._attention))

    @property
    def num_compressed(self) -> int:
        """Layers whose pages are ours."""
        return len(self._attention) if self.scheme.config is not None else 0

    @cached_property
    def token_bytes(self) -> int:
        """See ``Cache``; places that are left empty in a block are counted."""
        growing = [group for group in self._groups[0] if not group.window and not group.is_state]
        return sum(self.block_bytes // group.block_size for group in growing)

    def num_blocks(self, budget: int, sequences: int = 1) -> int:
        """Blocks that vLLM plans where so many sequences run at most, its own one included."""
        return max(budget - sequences * self.tail_bytes, 0) // self.block_bytes

    def nbytes(self, tokens: int, sequences: int = 1) -> int:
        """See ``Cache``; vLLM keeps one block for itself."""
        blocks = sum(group.blocks(tokens, self.chunk) for group in self._groups[0])
        return (sequences * blocks + 1) * self.block_bytes + sequences * self.tail_bytes


ENGINES = {"mlx_lm": MlxCache, "vllm": VllmCache}


def _rounded(count: int, step: int) -> int:
    """``count`` rounded up to whole steps."""
    return -(-count // step) * step
