"""What planner tests share: layers' specs, and what vLLM makes of them."""

from dataclasses import fields

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.integrations.vllm.spec import compressed

HEADS = 2


class NoModel(torch.nn.Module):
    """What vLLM takes for a text-generation model; it is never built."""

    def __init__(self, vllm_config, prefix=""):
        raise NotImplementedError

    def embed_input_ids(self, input_ids): ...

    def forward(self, input_ids, positions): ...

    def compute_logits(self, hidden_states): ...


def dense(head_dim=128, block_size=16, **more):
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=HEADS,
        head_size=head_dim,
        dtype=torch.bfloat16,
        **more,
    )


def sliding(head_dim=128, block_size=16, window=1024):
    return SlidingWindowSpec(
        block_size=block_size,
        num_kv_heads=HEADS,
        head_size=head_dim,
        dtype=torch.bfloat16,
        sliding_window=window,
    )


def packed(preset="tq4", spec=None):
    """The compressed twin of ``spec``, in blocks of one page."""
    spec = dense() if spec is None else spec
    return compressed(spec, TurboQuantConfig.from_names(preset, block_size=16))


def state(page_bytes, block_size, padded=None):
    """A Mamba layer's spec, with a state of so many bytes."""
    return MambaSpec(
        block_size=block_size,
        shapes=((page_bytes,),),
        dtypes=(torch.uint8,),
        page_size_padded=padded,
    )


def layers(*specs):
    """A model's layers, in order."""
    return {f"model.layers.{number}.attn": spec for number, spec in enumerate(specs)}


def planned(config, specs, memory):
    """The engine's plan for one worker with so many bytes."""
    return get_kv_cache_configs(config, [dict(specs)], [memory])[0]


def page_sizes(plan):
    """Layer name -> bytes of a block in the plan."""
    return {
        name: (
            group.kv_cache_spec.kv_cache_specs[name]
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
            else group.kv_cache_spec
        ).page_size_bytes
        for group in plan.kv_cache_groups
        for name in group.layer_names
    }


def field_values(spec):
    return {field.name: getattr(spec, field.name) for field in fields(spec)}


class Engine:
    """The scheduler's side of a plan: the KV cache manager, and requests for it."""

    def __init__(self, config, plan):
        plan = generate_scheduler_kv_cache_config([plan])
        scheduler_block, self.hash_block = resolve_kv_cache_block_sizes(plan, config)
        self.manager = KVCacheManager(
            kv_cache_config=plan,
            max_model_len=config.model_config.max_model_len,
            scheduler_block_size=scheduler_block,
            hash_block_size=self.hash_block,
            enable_caching=config.cache_config.enable_prefix_caching,
        )
        init_none_hash(sha256)

    def request(self, name, tokens):
        return Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(max_tokens=16),
            pooling_params=None,
            block_hasher=get_request_block_hasher(self.hash_block, sha256),
        )

    def start(self, request):
        """Give a request its blocks: ``(block ids by group, cached tokens)``; None where full."""
        cached, cached_tokens, *_ = self.manager.get_computed_blocks(request)
        new = self.manager.allocate_slots(
            request, request.num_tokens - cached_tokens, cached_tokens, cached
        )
        if new is None:
            return None
        return self.manager.get_block_ids(request.request_id), cached_tokens
