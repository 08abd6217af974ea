"""Blocks of hybrid models, as the plugin sets them in vLLM's configuration."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

from types import SimpleNamespace

import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_metal_tq.integrations.vllm import hybrid
from vllm_metal_tq.integrations.vllm.settings import Settings
from vllm_metal_tq.integrations.vllm.spec import token_bytes

HEADS, HEAD_DIM = 2, 128
SHAPES, DTYPES = ((8, 64), (4, 1024)), (torch.float32, torch.float32)
STATE_BYTES = 4 * (8 * 64 + 4 * 1024)
TQ4 = Settings.parse({"turboquant": True})
SIZE = token_bytes(TQ4.config, HEADS, HEAD_DIM)


class OneKind:
    """A model as most hybrid ones say what their states are."""

    @staticmethod
    def get_mamba_state_shape_from_config(vllm_config):
        return SHAPES

    @staticmethod
    def get_mamba_state_dtype_from_config(vllm_config):
        return DTYPES


class TwoKinds:
    """A model with two kinds of states."""

    @staticmethod
    def get_mamba_specs_from_config(vllm_config):
        shapes = ((2, 3),), SHAPES
        return [MambaSpec(shapes=s, dtypes=DTYPES[: len(s)], block_size=-1) for s in shapes]


class Platform:
    """A platform whose attention takes blocks of 32 tokens, and 16."""

    @staticmethod
    def _find_non_ssm_backend(vllm_config):
        sizes = [MultipleOf(32), 16]
        return SimpleNamespace(get_supported_kernel_block_sizes=lambda: sizes)


@pytest.fixture
def aligned(monkeypatch):
    """``cache_config`` of a model after ``align``."""

    def run(architecture=OneKind, settings=TQ4, block_size=None, mode="none", **facts):
        monkeypatch.setattr(
            hybrid.ModelRegistry, "resolve_model_cls", lambda *_, **__: (architecture, None)
        )
        model = SimpleNamespace(
            is_hybrid=True,
            architecture="Hybrid",
            get_num_kv_heads=lambda parallel: HEADS,
            get_head_size=lambda: HEAD_DIM,
        )
        cache = SimpleNamespace(
            block_size=16, mamba_page_size_padded=None, mamba_cache_mode=mode, mamba_block_size=7
        )
        model.__dict__.update(facts)
        config = SimpleNamespace(model_config=model, cache_config=cache, parallel_config=None)
        hybrid.align(Platform, config, settings, block_size)
        return cache

    return run


@pytest.mark.parametrize("architecture", [OneKind, TwoKinds])
def test_a_block_is_the_least_that_holds_the_largest_state(aligned, architecture):
    cache = aligned(architecture)
    assert cache.block_size % 16 == 0
    assert (cache.block_size - 16) * SIZE < STATE_BYTES <= cache.block_size * SIZE
    assert cache.mamba_page_size_padded == cache.block_size * SIZE


def test_a_block_is_a_multiple_of_what_the_user_says(aligned):
    assert aligned(block_size=80).block_size % 80 == 0


def test_states_that_prefixes_share_are_found_by_the_number_of_their_block(aligned):
    cache = aligned(mode="align")
    assert cache.mamba_block_size == cache.block_size
    assert aligned(mode="none").mamba_block_size == 7


def test_a_model_without_states_stays_as_it_is(aligned):
    cache = aligned(is_hybrid=False)
    assert (cache.block_size, cache.mamba_page_size_padded) == (16, None)


def test_layers_of_a_hybrid_model_are_compressed_alike(aligned):
    mixed = Settings.parse({"turboquant": True, "layer_overrides": {"0": "tq8"}})
    with pytest.raises(ValueError, match="layer_overrides cannot be given"):
        aligned(settings=mixed)
