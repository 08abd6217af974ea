"""Blocks of models with linear attention in some layers: as large as one of their states."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import MambaSpec

from .settings import Settings
from .spec import hybrid_alignment, token_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.vllm_metal_tq")


def align(
    platform: Any, vllm_config: VllmConfig, settings: Settings, user_block_size: int | None
) -> None:
    """Redo vLLM's alignment of pages and states with the size of compressed pages.

    Args:
        platform: vllm-metal's.
        vllm_config: vLLM's, already aligned for a dense cache.
        settings: what the user asked for.
        user_block_size: ``--block-size``, where it was given.

    Raises:
        ValueError: the model's attention layers are not compressed alike.
    """
    model = vllm_config.model_config
    if not (model and model.is_hybrid):
        return
    cache = vllm_config.cache_config
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    if settings.uncompressed or settings.config.layer_overrides:
        raise ValueError(
            "turboquant: layer_overrides cannot be given for a model with linear attention in "
            "some layers: its attention layers must all be compressed alike"
        )
    bytes_per_token = token_bytes(settings.config, heads, model.get_head_size())
    backend = platform._find_non_ssm_backend(vllm_config)
    kernel = min(
        size.base if isinstance(size, MultipleOf) else size
        for size in backend.get_supported_kernel_block_sizes()
    )
    alignment = lcm(
        kernel,
        settings.config.block_size,
        user_block_size or 1,
        getattr(cache, "prefix_match_unit", None) or 1,
    )
    cache.block_size, cache.mamba_page_size_padded = hybrid_alignment(
        [bytes_per_token], _state_bytes(vllm_config), alignment, cache.block_size
    )
    if cache.mamba_cache_mode == "align":  # states are found by the number of their block
        cache.mamba_block_size = cache.block_size
    logger.info("turboquant: blocks of %d tokens hold a state", cache.block_size)


def _state_bytes(vllm_config: VllmConfig) -> int:
    """Of the largest state that a layer keeps."""
    model = vllm_config.model_config
    architecture, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    if hasattr(architecture, "get_mamba_specs_from_config"):  # layers of several kinds
        specs = architecture.get_mamba_specs_from_config(vllm_config)
        return max(int(spec.page_size_bytes) for spec in specs)
    shapes = architecture.get_mamba_state_shape_from_config(vllm_config)
    dtypes = architecture.get_mamba_state_dtype_from_config(vllm_config)
    return int(MambaSpec(shapes=shapes, dtypes=dtypes, block_size=-1).page_size_bytes)
