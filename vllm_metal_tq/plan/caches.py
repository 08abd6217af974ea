"""Bytes that a cache takes for so many sequences of so many tokens, in each engine.

Whole blocks are counted, the last tokens that are kept as they came, windows and states. Two
engines allocate differently: mlx_lm, whose layers each have a cache of their own, and vLLM, whose
layers share the blocks of one pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from ..config import TurboQuantConfig
from ..layout import PageLayout
from ..sequences import most_tokens
from ..tail import TAIL
from .layers import Layer, Model

BLOCK = TurboQuantConfig.block_size  # tokens of a compressed block, and of vLLM's
MLX_STEP = 256  # tokens by which mlx_lm's caches grow
MLX_GROUP = 64  # elements that share a scale and a bias in its quantised cache, 2 bytes each


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


@dataclass(frozen=True)
class Cache(ABC):
    """The cache of a model in one engine and scheme."""

    model: Model
    scheme: Scheme

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """What one more token takes where all windows are full, blocks aside."""

    @abstractmethod
    def nbytes(self, tokens: int, sequences: int = 1) -> int:
        """Bytes for so many sequences of so many tokens each."""

    def compresses(self, layer: Layer) -> bool:
        """Whether this layer's cache is ours."""
        return self.scheme.config is not None and layer.is_attention

    @cached_property
    def num_compressed(self) -> int:
        """Layers whose cache is ours."""
        return sum(map(self.compresses, self.model.layers))

    def layer_bytes(self, layer: Layer) -> int:
        """Bytes of one token in one layer."""
        if self.scheme.mlx_bits is not None or self.compresses(layer):
            return self.scheme.token_bytes(layer)
        return layer.bf16_token_bytes

    def read_bytes(self, tokens: int) -> int:
        """Bytes that a decode step reads for a sequence of so many tokens."""
        return sum(
            layer.state_bytes + min(tokens, layer.window or tokens) * self.layer_bytes(layer)
            for layer in self.model.layers
        )


@dataclass(frozen=True)
class MlxCache(Cache):
    """mlx_lm's caches, ours in the place of those that can be compressed.

    Ours are allocated by the block within ``serve --kv-budget``; without a budget they grow by an
    eighth at a time. Windows, of either kind, hold a prompt's last chunk as well until the next
    token comes, which is not counted.

    Raises:
        Unsupported: mlx_lm has no quantised cache for this model.
    """

    def __post_init__(self) -> None:
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

    @cached_property
    def token_bytes(self) -> int:
        """See ``Cache``."""
        return sum(self.layer_bytes(layer) for layer in self.model.layers if not layer.window)

    def nbytes(self, tokens: int, sequences: int = 1) -> int:
        """See ``Cache``."""
        each = Counter(self.model.layers)  # few kinds of many layers
        return sequences * sum(n * self._nbytes(layer, tokens) for layer, n in each.items())

    def _nbytes(self, layer: Layer, tokens: int) -> int:
        if self.compresses(layer):
            tail = self.scheme.tail_bytes(layer) if tokens else 0
            if layer.window:
                tokens = min(tokens, most_tokens(layer.window, BLOCK))
            return _rounded(tokens, BLOCK) * self.layer_bytes(layer) + tail
        kept = _rounded(tokens, MLX_STEP)
        if layer.window:
            kept = min(kept, layer.window)
        return layer.state_bytes + kept * self.layer_bytes(layer)


@dataclass(frozen=True)
class VllmCache(Cache):
    """Blocks as vLLM's planner divides a budget into them, for the layers that vllm-metal names.

    Every attention layer keeps the whole context, windows too, and all take one block together.
    In a hybrid model the other layers, in groups of as many, take blocks of the same pool for
    their states, and a block is as long as it takes to cover a state.

    Outside of blocks vllm-metal holds out states while their pool grows; and the plugin, for each
    sequence, its last tokens as they came, and for one, what a layer keeps of it, uncompressed.

    Raises:
        Unsupported: the plugin refuses the model, or its layers are planned in another way.
    """

    def __post_init__(self) -> None:
        if self.scheme.mlx_bits is not None:
            raise Unsupported("vLLM does not offer it")
        shared = any(layer.shared for layer in self.model.layers)
        if self.scheme.config is None:
            shapes = {(layer.kv_heads, layer.key_dim) for layer in self._attention}
            if len(shapes) > 1 and any(layer.window for layer in self._attention) and not shared:
                raise Unsupported("vllm-metal's blocks for windows of other shapes: not modelled")
        elif not all(layer.is_attention for layer in self._attention):
            raise Unsupported("the plugin refuses latents (MLA)")
        if 0 < self.num_states < 1.5 * len(self._attention):
            raise Unsupported("vLLM's blocks for so few states beside attention: not modelled")

    @cached_property
    def _attention(self) -> list[Layer]:
        return [layer for layer in self.model.layers if layer.kv_heads]

    @cached_property
    def num_states(self) -> int:
        """Layers that keep a state."""
        return len(self.model.layers) - len(self._attention)

    @cached_property
    def token_bytes(self) -> int:
        """See ``Cache``."""
        return sum(map(self.layer_bytes, self._attention))

    @cached_property
    def block_size(self) -> int:
        """Tokens of a block, in whose bytes of a layer a state fits."""
        state = max(layer.state_bytes for layer in self.model.layers)
        tokens = -(-state // max(map(self.layer_bytes, self._attention)))
        return max(_rounded(tokens, BLOCK), BLOCK)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers that take it together."""
        return self.block_size * self.token_bytes

    def held_out(self, tokens: int, sequences: int = 1) -> int:
        """Bytes outside of blocks for ``--max-model-len`` and ``--max-num-seqs``."""
        states = sum(layer.state_bytes for layer in self.model.layers)
        growing = 2 * min(sequences, 2) - 1  # as vllm-metal's cache_policy.py has it
        held = growing * states
        if self.scheme.config is not None:
            held += sequences * sum(map(self.scheme.tail_bytes, self._attention))
            held += tokens * max(layer.bf16_token_bytes for layer in self._attention)
        return held

    def num_blocks(self, budget: int, tokens: int, sequences: int = 1) -> int:
        """Blocks that vLLM plans for these limits, its own one included."""
        return max(budget - self.held_out(tokens, sequences), 0) // self.block_bytes

    def nbytes(self, tokens: int, sequences: int = 1) -> int:
        """See ``Cache``; vLLM keeps one block for itself."""
        groups = -(-self.num_states // len(self._attention))
        blocks = sequences * (-(-tokens // self.block_size) + groups) + 1
        return blocks * self.block_bytes + self.held_out(tokens, sequences)


ENGINES: dict[str, type[Cache]] = {"mlx_lm": MlxCache, "vllm": VllmCache}


def _rounded(count: int, step: int) -> int:
    """``count`` rounded up to whole steps."""
    return -(-count // step) * step
