"""What the planner knows of a model: what its layers keep of a sequence, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .weights import BITS, GROUPS, Weights

BF16 = 2  # bytes of an element


@dataclass(frozen=True)
class Layer:
    """What one layer keeps of a sequence.

    Attributes:
        kv_heads: heads of what it keeps of each token; 1 for the latent of MLA, 0 for none.
        key_dim: elements of a key; of MLA, of the latent.
        value_dim: elements of a value; of MLA, of the key that carries the position.
        window: the last tokens that it keeps; 0 is all.
        shared: whether other layers read what it keeps.
        state_bytes: bytes of a state that does not grow (linear attention).
    """

    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    shared: bool = False
    state_bytes: int = 0

    @property
    def is_attention(self) -> bool:
        """Whether it keeps keys and values of one size: what can be compressed."""
        return self.kv_heads > 0 and self.key_dim == self.value_dim

    @property
    def bf16_token_bytes(self) -> int:
        """Bytes of what it keeps of one token, uncompressed."""
        return BF16 * self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Model:
    """A model as the planner sees it.

    Attributes:
        name: how the user called it.
        layers: those that keep something of a sequence.
        weights: elements of its weights.
        max_position: the longest context that it was made for, None where its config is silent.
        quantization: what its config says of quantised weights.
    """

    name: str
    layers: tuple[Layer, ...]
    weights: Weights
    max_position: int | None
    quantization: Mapping[str, Any]

    def weight_bytes(self, bits: int | None, part: Weights | None = None) -> int:
        """Bytes of the weights in ``bits``, or as they were published where it is None.

        Args:
            bits: as mlx_lm quantises, in groups of 64; 16 is bf16.
            part: elements to count in place of all.

        Raises:
            ValueError: they were published in a format whose size is not known here.
        """
        weights = self.weights if part is None else part
        if bits is not None:
            return weights.nbytes(bits)
        said = self.quantization
        if not said:
            return weights.nbytes(16)
        if said.get("quant_method") == "mxfp4":
            return weights.mxfp4_bytes
        method = said.get("quant_method", said.get("mode", "affine"))
        bits, group = said.get("bits"), said.get("group_size")
        if method == "affine" and bits in BITS and group in GROUPS:  # mlx_lm's own
            return weights.nbytes(bits, group)
        raise ValueError(
            f"{self.name}: its weights are quantised by {method!r} in {bits!r} bits and groups of "
            f"{group!r}, whose size is not known here: say --weights-bits"
        )
