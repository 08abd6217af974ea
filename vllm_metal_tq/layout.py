"""Bytes: where each bit of a token lies in its page. No other module knows sizes or offsets.

A *row* is one token of one KV head as the codec makes it: key planes, value planes, then the
two fp16 scales. A *page* is one block of one KV head::

    [sub-block 0][sub-block 1]...[scales]      a sub-block holds 16 tokens
    [plane, 16 tokens][plane, 16 tokens]...    inside a sub-block; token-major in a plane
    [key scale, value scale] * block_size      fp16, 4 bytes a token

Widths that are no power of two are split into planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), so
every token owns whole bytes and an append never reads what it overwrites. There is no padding:
a plane of b bits takes 2 * b * rotated_dim bytes, a multiple of 128 for all widths from 64
dimensions (80 dimensions: from 4 bits), and a page of 32 tokens is then a multiple of 128 too;
with 16 tokens its 64 bytes of scales leave every other page at a multiple of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .config import TurboQuantConfig
from .rotation import rotated_dim

PLANE_BITS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Code width -> widths of its planes, from the code's low bits to its high bits."""

SUB_BLOCK = 16
SCALE_BYTES = 4  # fp16 key scale, fp16 value scale


@dataclass(frozen=True)
class PageLayout:
    """The bytes of one page: a block of tokens of one KV head.

    Attributes:
        config: code widths and block size.
        head_dim: elements of a key and of a value, before rotation.
    """

    config: TurboQuantConfig
    head_dim: int

    def __post_init__(self):
        rotated_dim(self.head_dim)  # refuses what cannot be rotated

    @cached_property
    def dim(self) -> int:
        """Elements of a rotated key or value."""
        return rotated_dim(self.head_dim)

    @cached_property
    def plane_bytes(self) -> tuple[int, ...]:
        """Bytes a token takes in each plane, key planes first."""
        planes = PLANE_BITS[self.config.k_bits] + PLANE_BITS[self.config.v_bits]
        return tuple(bits * self.dim // 8 for bits in planes)

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
        return 8 * self.page_bytes / (2 * self.head_dim * self.config.block_size)

    @property
    def bf16_page_bytes(self) -> int:
        """Bytes that the same block takes uncompressed, as bf16 keys and values."""
        return 2 * 2 * self.head_dim * self.config.block_size

    def split(self, pages):
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
        parts, start = [], 0
        for width in self.plane_bytes:
            plane = codes[..., start : start + SUB_BLOCK * width]
            parts.append(plane.reshape(*shape, block_size, width))
            start += SUB_BLOCK * width
        return [*parts, scales.reshape(*shape, block_size, SCALE_BYTES)]

    @cached_property
    def byte_offsets(self) -> np.ndarray:
        """Offset in the page of every row byte: uint32 ``(block_size, row_bytes)``."""
        offsets = np.arange(self.page_bytes, dtype=np.uint32)
        return np.concatenate(self.split(offsets), axis=-1)
