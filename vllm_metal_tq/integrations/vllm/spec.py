"""KV cache specs whose pages are ours: what vLLM's planner divides the memory by.

The planner asks each layer's spec for the bytes of a block and decides from these how many blocks
there are, which layers share them, and how long a request may get. Which property it asks has
changed: until 0.27 the others follow from ``real_page_size_bytes``, since 0.28 from
``state_content_size_bytes``. Ours override all of them with the bytes of ``layout.py``, and
``check_page_size`` finds out whether the installed version listens.

vLLM knows a spec by its base classes, so a subclass needs no registration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import lcm
from typing import TYPE_CHECKING

import torch
import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.layout import SUB_BLOCK, PageLayout

PAGE_DTYPE = torch.uint8
"""What a compressed layer's spec gives as its dtype: pages are bytes."""


if TYPE_CHECKING:  # what comes after _CompressedPages
    from vllm.v1.kv_cache_interface import FullAttentionSpec as _Spec
else:
    _Spec = object


def token_bytes(config: TurboQuantConfig, num_kv_heads: int, head_dim: int) -> int:
    """Bytes that one token takes in one layer, all its KV heads together.

    Raises:
        ValueError: ``head_dim`` cannot be rotated.
    """
    return num_kv_heads * PageLayout(config, head_dim).row_bytes


class _CompressedPages(_Spec):
    """What both specs have in common; comes before vLLM's class, so that it takes precedence.

    A vLLM block of ``block_size`` tokens is one or several of our pages for each KV head, so its
    bytes depend on the number of its tokens alone.
    """

    block_size: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: torch.dtype
    k_width: int
    v_width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size % SUB_BLOCK:
            raise ValueError(
                f"block_size {self.block_size} does not fit compressed pages: "
                f"expected a multiple of {SUB_BLOCK}"
            )
        if self.head_size_v != self.head_size:
            raise ValueError(
                f"keys of {self.head_size} and values of {self.head_size_v} elements cannot be "
                "compressed: expected one head size for both"
            )
        if self.dtype != PAGE_DTYPE:
            # vLLM would merge such a layer into a group of dense ones, which compares dtypes only.
            raise ValueError(f"dtype {self.dtype}: compressed pages are {PAGE_DTYPE}")
        token_bytes(self._config, self.num_kv_heads, self.head_size)  # refuses what has no layout

    @property
    def _config(self) -> TurboQuantConfig:
        return TurboQuantConfig(self.k_width, self.v_width)

    @property
    def unpadded_page_size_bytes(self) -> int:
        """Bytes of a block in this layer, without ``page_size_padded``."""
        return self.block_size * token_bytes(self._config, self.num_kv_heads, self.head_size)

    @property
    def real_page_size_bytes(self) -> int:
        """The same, as older versions and vllm-metal call it."""
        return self.unpadded_page_size_bytes

    @property
    def state_content_size_bytes(self) -> int:
        """Bytes of one token of one KV head; newer versions lay out tensors by it."""
        return token_bytes(self._config, 1, self.head_size)

    @classmethod
    def merge(cls, specs: Sequence[_CompressedPages]) -> _CompressedPages:
        """The spec of layers that share a block table; they are equal in every field.

        Raises:
            AssertionError: they differ. vLLM then gives each layer pages of its own size
                (``UniformTypeKVCacheSpecs``).
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers with different compressed pages share no spec")
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class TurboQuantAttentionSpec(_CompressedPages, FullAttentionSpec):
    """A full-attention layer whose keys and values are compressed.

    Attributes:
        k_width: code of keys, one of ``config.WIDTHS``.
        v_width: likewise of values.

    Raises:
        ValueError: the block size, the head size, the dtype or a width does not fit our pages.
    """

    k_width: int
    v_width: int


@dataclass(frozen=True, kw_only=True)
class TurboQuantSlidingWindowSpec(_CompressedPages, SlidingWindowSpec):
    """A sliding-window layer whose keys and values are compressed.

    Only for vLLM's hybrid KV cache manager: where that is disabled, vLLM turns sliding-window
    layers into dense ``FullAttentionSpec``. Say ``TurboQuantAttentionSpec(sliding_window=...)``
    there.

    Attributes:
        k_width: code of keys, one of ``config.WIDTHS``.
        v_width: likewise of values.

    Raises:
        ValueError: the block size, the head size, the dtype or a width does not fit our pages.
    """

    k_width: int
    v_width: int


_TWINS = {
    FullAttentionSpec: TurboQuantAttentionSpec,
    SlidingWindowSpec: TurboQuantSlidingWindowSpec,
}


def compressed(spec: KVCacheSpec, config: TurboQuantConfig) -> KVCacheSpec:
    """The compressed twin of a dense layer's spec.

    Args:
        spec: a ``FullAttentionSpec`` or ``SlidingWindowSpec``. All its fields are kept but the
            dtype; ``page_size_padded`` too.
        config: widths and block size of this layer, without overrides.

    Raises:
        TypeError: another kind of layer, MLA or a subclass that stores something else.
        ValueError: the layer's block is not made of whole pages, or has no layout.
    """
    twin = _TWINS.get(type(spec))  # exact: a subclass may store something else
    if twin is None:
        raise TypeError(
            f"a layer with {type(spec).__name__} cannot be compressed: "
            f"only {' and '.join(known.__name__ for known in _TWINS)}"
        )
    if config.layer_overrides:
        raise ValueError("the config of one layer is needed: config.for_layer(number)")
    if spec.block_size % config.block_size:
        raise ValueError(
            f"blocks of {spec.block_size} tokens are not made of pages of {config.block_size}"
        )
    kept = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return twin(**kept | {"dtype": PAGE_DTYPE}, k_width=config.k_width, v_width=config.v_width)


def check_page_size() -> None:
    """Make sure that the installed vLLM plans with our bytes.

    Raises:
        RuntimeError: it plans with other bytes.
    """
    heads, config = 2, TurboQuantConfig.from_names(block_size=32)
    expected = heads * PageLayout(config, 128).page_bytes
    block = {"block_size": 32, "num_kv_heads": heads, "head_size": 128, "dtype": torch.bfloat16}
    for dense in (FullAttentionSpec(**block), SlidingWindowSpec(**block, sliding_window=4096)):
        planned = compressed(dense, config).page_size_bytes
        if planned != expected:
            raise RuntimeError(
                f"vLLM {vllm.__version__} is not supported: it plans {planned} bytes for a "
                f"{type(dense).__name__} block of {expected} bytes"
            )


def hybrid_alignment(
    bytes_per_token: Iterable[int], mamba_page_bytes: int, alignment: int, block_size: int
) -> tuple[int, int | None]:
    """Give attention and Mamba (or GDN) layers pages of one size, as vLLM's planner wants them.

    Compressed tokens are small, so it takes more of them to cover a state than vLLM's own
    alignment, done for dense tokens, has found.

    Args:
        bytes_per_token: ``token_bytes`` of each attention layer.
        mamba_page_bytes: bytes of a layer's state, without padding; 0 where there is none.
        alignment: tokens that a block must be a multiple of: the kernel's block, the user's.
        block_size: tokens of a block so far.

    Returns:
        ``(block_size, mamba_page_size_padded)``: tokens of a block, never fewer than before, and
        the bytes to pad a state to, None where it fills its page.

    Raises:
        ValueError: attention layers differ in size. Padding all pages to the widest would give
            back what the narrow ones save, and no block size makes them equal.
    """
    if mamba_page_bytes == 0:
        return block_size, None
    sizes = sorted(set(bytes_per_token))
    if len(sizes) != 1:
        raise ValueError(
            "a hybrid model's attention layers must all be compressed alike, without "
            f"layer_overrides: theirs take {', '.join(map(str, sizes))} bytes per token"
        )
    step = lcm(alignment, SUB_BLOCK)
    tokens = max(block_size, -(-mamba_page_bytes // sizes[0]))
    block_size = -(-tokens // step) * step
    page_bytes = block_size * sizes[0]
    return block_size, None if page_bytes == mamba_page_bytes else page_bytes
