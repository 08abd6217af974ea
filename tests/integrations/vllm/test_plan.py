"""The engine plans as many blocks as ``vllm-metal-tq plan --engine vllm`` says."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

import torch
from planning import layers, planned
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from vllm_metal_tq.integrations.vllm.spec import compressed
from vllm_metal_tq.plan import models
from vllm_metal_tq.plan.caches import Unsupported, VllmCache
from vllm_metal_tq.plan.plan import schemes
from vllm_metal_tq.plan.sources import shipped

MEMORY = 1_000_000_000
SCHEMES = {scheme.name: scheme for scheme in schemes() if scheme.mlx_bits is None}


def spec(layer, cache):
    """What vLLM hears of a layer."""
    if layer.state_bytes:
        attention = next(layer for layer in cache.model.layers if layer.kv_heads)
        return MambaSpec(
            block_size=4096,
            shapes=((layer.state_bytes,),),
            dtypes=(torch.uint8,),
            page_size_padded=cache.block_size * cache.scheme.token_bytes(attention),
        )
    fields = {
        "block_size": cache.block_size,
        "num_kv_heads": layer.kv_heads,
        "head_size": layer.key_dim,
        "dtype": torch.bfloat16,
    }
    if layer.window:
        dense = SlidingWindowSpec(**fields, sliding_window=layer.window)
    else:
        dense = FullAttentionSpec(**fields)
    return dense if cache.scheme.config is None else compressed(dense, cache.scheme.config)


def plan_of(name, scheme, vllm_config, **options):
    """vLLM's plan and ours, and vLLM's settings."""
    model = models.read(name, shipped()[name]["config"])
    try:
        cache = VllmCache(model, SCHEMES[scheme])
    except Unsupported as reason:
        pytest.skip(str(reason))
    settings = vllm_config(cache.block_size, **options)
    chunk = getattr(settings, "max_in_flight_tokens", None)
    chunk = chunk or settings.scheduler_config.max_num_batched_tokens
    cache = VllmCache(model, SCHEMES[scheme], chunk)
    specs = layers(*[spec(layer, cache) for layer in model.layers])
    return planned(settings, specs, MEMORY - cache.tail_bytes), cache, settings


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", shipped())
def test_the_engine_plans_the_same_number_of_blocks(vllm_config, name, scheme):
    theirs, ours, _ = plan_of(name, scheme, vllm_config)
    assert theirs.num_blocks == ours.num_blocks(MEMORY)


@pytest.mark.parametrize("scheme", ["bf16", "tq8"])
@pytest.mark.parametrize("name", shipped())
def test_the_engine_fits_the_same_longest_context(vllm_config, name, scheme):
    theirs, ours, settings = plan_of(name, scheme, vllm_config, max_model_len=-1)
    longest = settings.model_config.max_model_len
    # Older versions do not leave out the block that vLLM keeps for itself.
    kept_back = ours.block_bytes if ours.nbytes(longest) > MEMORY else 0
    assert ours.nbytes(longest) - kept_back <= MEMORY
    if longest < settings.model_config.hf_config.max_position_embeddings:
        assert ours.nbytes(longest + 1) - kept_back > MEMORY
    assert theirs.num_blocks == ours.num_blocks(MEMORY)
