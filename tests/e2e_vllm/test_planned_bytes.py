"""What vllm-metal and the plugin tell the engine of each shipped model is what ``plan`` counts."""

import copy
from types import SimpleNamespace

import mlx.core as mx
import pytest

pytest.importorskip("vllm_metal_on_linux", reason="needs vLLM and vllm-metal: make e2e-vllm")

from mlx_lm.utils import _get_classes
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm_metal.v1.cache_policy import ModelCachePolicy, WorkerCachePlanner
from vllm_metal.v1.model_adapter import DefaultModelAdapter
from vllm_metal.v1.model_lifecycle import ModelLifecycle
from vllm_metal.v1.model_runner import MetalModelRunner

from vllm_metal_tq.integrations.vllm.backend import CachePolicy
from vllm_metal_tq.integrations.vllm.settings import Settings
from vllm_metal_tq.plan import models
from vllm_metal_tq.plan.caches import VllmCache
from vllm_metal_tq.plan.plan import schemes
from vllm_metal_tq.plan.sources import shipped

MAX_LEN, MAX_SEQS = 8192, 3
SCHEMES = [scheme for scheme in schemes() if scheme.mlx_bits is None]
UNCHANGED = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}  # what says nothing of sizes


class Runner(MetalModelRunner):
    """vllm-metal's runner of a model that is not loaded."""

    def __init__(self, config, block_size):
        self.model_config = SimpleNamespace(model="a model", max_model_len=MAX_LEN)
        self.cache_config = SimpleNamespace(
            block_size=block_size,
            mamba_block_size=MAX_LEN,
            mamba_page_size_padded=None,
            mamba_cache_mode="none",
            num_gpu_blocks_override=None,
        )
        self.scheduler_config = SimpleNamespace(
            max_num_seqs=MAX_SEQS, disable_hybrid_kv_cache_manager=False
        )
        self.vllm_config = SimpleNamespace(
            speculative_config=None,
            scheduler_config=self.scheduler_config,
            cache_config=self.cache_config,
        )
        self.kv_cache_dtype = mx.bfloat16
        self.pp = self._draft_dims = self._pooling_backend = self._gemma4_mtp_assistant = None
        lifecycle = ModelLifecycle(self, DefaultModelAdapter())
        _, args_class = _get_classes(config)
        model = SimpleNamespace(args=args_class.from_dict(config))
        self.model_args = lifecycle._extract_model_args(model, is_vlm=False)
        lifecycle.resolve_model_dims()


def published(name):
    """A shipped config, with what mlx_lm wants besides."""
    config = copy.deepcopy(shipped()[name]["config"])
    text = config.get("text_config", config)
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    text |= {key: value for key, value in UNCHANGED.items() if key not in text}
    return config


def policy(name, scheme, block_size):
    """What plans for a model: vllm-metal's own, or the plugin's."""
    runner, adapter = Runner(published(name), block_size), DefaultModelAdapter()
    if scheme.config is None:
        runner._cache_policy = ModelCachePolicy(runner, adapter)
    else:
        runner._cache_policy = CachePolicy(runner, adapter, Settings(scheme.config))
    return runner._cache_policy


def held_out(policy):
    """Bytes that vllm-metal's own plan keeps back."""
    planner = WorkerCachePlanner(SimpleNamespace(model_runner=policy._runner))
    return policy.draft_scratch_reserve_bytes() + planner._hybrid_gdn_reservation().total_bytes


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("name", shipped())
def test_the_engine_hears_the_planned_bytes(name, scheme):
    model = models.read(name, shipped()[name]["config"])
    planned = VllmCache(model, scheme)
    real = policy(name, scheme, planned.block_size)
    real.validate_paged_attention_support()
    specs = real.get_kv_cache_spec().values()
    attention = [spec for spec in specs if isinstance(spec, FullAttentionSpec)]
    assert sum(spec.page_size_bytes for spec in attention) == planned.block_bytes
    assert len(specs) - len(attention) == planned.num_states
    assert real.get_cache_block_size_bytes() == planned.block_bytes
    assert held_out(real) == planned.held_out(MAX_LEN, MAX_SEQS)
