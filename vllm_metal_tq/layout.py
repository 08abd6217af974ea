"""Bytes: where each bit of a token lies in its page. No other module knows sizes or offsets.

A *row* is one token of one KV head as the codec makes it: key planes, value planes, then the
two fp16 scales. A *page* is one block of one KV head::

    [sub-block 0][sub-block 1]...[scales]      a sub-block holds 16 tokens
    [plane, 16 tokens][plane, 16 tokens]...    key planes, then value planes
    [unit, 16 tokens][unit, 16 tokens]...      a unit is 128 dimensions of a plane, or the rest
    [key scale, value scale] * block_size      fp16, 4 bytes a token

Inside a unit the bytes lie as the 32 lanes of the decode kernels take them (metal/README.md):

* keys: token by token. A lane takes 32 consecutive dimensions (16 where head_dim is at most 64,
  or a plane has 8 bits) and finds dimensions d and d + 16 (d + 8) in the two halves of a word.
* values: a lane takes 16 consecutive dimensions (8 where head_dim is at most 64) of the tokens
  2q, 2q + 1, 2q + 8 and 2q + 9, and finds two neighbouring tokens in the two halves of a word.

Widths that are no power of two are split into planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), so
every token owns whole bytes and an append never reads what it overwrites. Trellis codes have a
plane for each bit, that of the trellis first (``trellis.py``). There is no padding;
pages are multiples of 64 bytes, and every lane's bytes of a unit lie together, up to 16 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import mlx.core as mx
import numpy as np

from .config import T2, T3, TurboQuantConfig
from .rotation import rotated_dim

Array = TypeVar("Array", mx.array, np.ndarray)

PLANE_BITS = {
    **{2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)},
    **{T2: (1, 1), T3: (1, 1, 1)},
}
"""Code width -> bits of its planes, from the code's low bits to its high bits."""

SUB_BLOCK = 16
UNIT = 128
SCALE_BYTES = 4  # fp16 key scale, fp16 value scale


@dataclass(frozen=True)
class PageLayout:
    """The bytes of one page: a block of tokens of one KV head.

    Attributes:
        config: code widths and block size.
        head_dim: elements of a key, before rotation.
        v_head_dim: elements of a value, of which zeros make ``head_dim``; 0 stands for as many.
    """

    config: TurboQuantConfig
    head_dim: int
    v_head_dim: int = 0

    def __post_init__(self) -> None:
        rotated_dim(self.head_dim)  # refuses what cannot be rotated
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)
        if not 0 < self.v_head_dim <= self.head_dim:
            raise ValueError(
                f"v_head_dim {self.v_head_dim} must be from 1 to the keys' head_dim {self.head_dim}"
            )

    @cached_property
    def _hash(self) -> int:
        return hash((self.config, self.head_dim, self.v_head_dim))

    def __hash__(self) -> int:
        return self._hash  # computed once, because every layer of every step looks layouts up

    @cached_property
    def dim(self) -> int:
        """Elements of a rotated key or value."""
        return rotated_dim(self.head_dim)

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane, key planes first."""
        return PLANE_BITS[self.config.k_width] + PLANE_BITS[self.config.v_width]

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """Bytes a token takes in each plane, key planes first."""
        return tuple(bits * self.dim // 8 for bits in self.planes)

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's codes."""
        return sum(self.plane_bytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one KV head: codes and scales, nothing else."""
        return self.code_bytes + SCALE_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of one block of one KV head."""
        return self.row_bytes * self.config.block_size

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key or value element, scales and padding included."""
        return 16 * self.page_bytes / self.bf16_page_bytes

    @property
    def bf16_page_bytes(self) -> int:
        """Bytes that the same block takes uncompressed, as bf16 keys and values."""
        return 2 * (self.head_dim + self.v_head_dim) * self.config.block_size

    def split(self, pages: Array) -> list[Array]:
        """Take pages apart; the one statement of where bytes lie.

        Args:
            pages: ``(..., page_bytes)``, of MLX or NumPy.

        Returns:
            A list of ``(..., block_size, n)``: each plane, key planes first, then the scales.
        """
        block_size = self.config.block_size
        codes = pages[..., : self.code_bytes * block_size]
        scales = pages[..., self.code_bytes * block_size :]
        shape = pages.shape[:-1]
        codes = codes.reshape(*shape, block_size // SUB_BLOCK, SUB_BLOCK * self.code_bytes)
        parts: list[list[Array]] = []
        start = 0
        for number, bits in enumerate(self.planes):
            in_tokens = _key_unit if number < len(PLANE_BITS[self.config.k_width]) else _value_unit
            units: list[Array] = []
            for dims in self._units:
                end = start + SUB_BLOCK * dims * bits // 8
                unit = in_tokens(codes[..., start:end], bits, dims, self.dim)
                units.append(unit.reshape(*shape, block_size, dims * bits // 8))
                start = end
            parts.append(units)
        concatenate = np.concatenate if isinstance(pages, np.ndarray) else mx.concatenate
        split = [concatenate(units, axis=-1) if units[1:] else units[0] for units in parts]
        split.append(scales.reshape(*shape, block_size, SCALE_BYTES))
        return split

    @property
    def _units(self) -> list[int]:
        return [min(UNIT, self.dim - start) for start in range(0, self.dim, UNIT)]

    @cached_property
    def byte_offsets(self) -> np.ndarray:
        """Offset in the page of every row byte: uint32 ``(block_size, row_bytes)``."""
        offsets = np.arange(self.page_bytes, dtype=np.uint32)
        return np.concatenate(self.split(offsets), axis=-1)


def _key_unit(unit: Array, bits: int, dims: int, dim: int) -> Array:
    """Bytes ``(..., n)`` of a unit of keys, with tokens and their bytes in order."""
    lane_dims = 16 if dim <= 64 or bits == 8 else 32
    half = lane_dims // 2 * bits // 8
    piece = min(half, 2)
    shape = (*unit.shape[:-1], SUB_BLOCK, dims // lane_dims, half // piece, 2, piece)
    return unit.reshape(shape).swapaxes(-3, -2)


def _value_unit(unit: Array, bits: int, dims: int, dim: int) -> Array:
    """Bytes ``(..., n)`` of a unit of values, with tokens and their bytes in order."""
    lane_dims = 8 if dim <= 64 else 16
    size, lanes = lane_dims * bits // 8, dims // lane_dims
    lead = unit.shape[:-1]
    if size == 1:  # both token pairs of a lane in one word: [row][quad][token parity][pair]
        return _transposed(unit.reshape(*lead, lanes, 4, 2, 2), (3, 1, 2, 0))
    # [pair][load][row][quad][pair][word][token parity][2 bytes]: a lane loads at most 16 bytes
    apart, together = (2, 1) if size >= 8 else (1, 2)
    loads = max(size // 8, 1)
    words = size // 2 // loads
    parts = unit.reshape(*lead, apart, loads, lanes, 4, together, words, 2, 2)
    return _transposed(parts, (0, 4, 3, 6, 2, 1, 5, 7))


def _transposed(x: Array, axes: tuple[int, ...]) -> Array:
    """Permute the last ``len(axes)`` axes."""
    first = x.ndim - len(axes)
    return x.transpose(*range(first), *(first + axis for axis in axes))
