"""The engine plans, and gives requests, what ``vllm-metal-tq plan --engine vllm`` says."""

import contextlib

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

import torch
from planning import Engine, layers, planned
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from vllm_metal_tq.integrations.vllm.spec import compressed, hybrid_alignment
from vllm_metal_tq.plan import models
from vllm_metal_tq.plan.caches import Unsupported, VllmCache
from vllm_metal_tq.plan.machine import Machine
from vllm_metal_tq.plan.plan import Question, plan, schemes
from vllm_metal_tq.plan.sources import shipped

MEMORY = 200_000_000
ROOM = Machine(1 << 40, 1 << 40)  # for the weights
SCHEMES = {scheme.name: scheme for scheme in schemes() if scheme.mlx_bits is None}
MODELS = {name: models.read(name, entry["config"]) for name, entry in shipped().items()}


def offered():
    """The caches of all shipped models that the engine has, by name."""
    for model in MODELS.values():
        for scheme in SCHEMES.values():
            with contextlib.suppress(Unsupported):
                yield f"{model.name}-{scheme.name}", VllmCache(model, scheme)


CACHES = dict(offered())
every_cache = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)


def test_all_are_planned():
    assert set(CACHES) == {f"{name}-{scheme}" for name in MODELS for scheme in SCHEMES}


def answer(cache, **asked):
    """The row of ``plan``."""
    question = Question(cache.model, ROOM, engine="vllm", kv_budget=MEMORY, **asked)
    return plan(question, [cache.scheme]).rows[0]


def specs(cache, block_size):
    """What vllm-metal, or the plugin, says of each layer: windows are not told apart."""
    for layer in cache.model.layers:
        if layer.state_bytes:
            yield MambaSpec(
                block_size=1024 * block_size,  # one for a whole sequence: no prefix caching
                shapes=((layer.state_bytes,),),
                dtypes=(torch.uint8,),
                page_size_padded=block_size * max(map(cache.layer_bytes, cache.model.layers)),
            )
            continue
        dense = FullAttentionSpec(
            block_size=block_size,
            num_kv_heads=layer.kv_heads,
            head_size=layer.key_dim,
            dtype=torch.bfloat16,
        )
        config = cache.scheme.config
        yield compressed(dense, config) if config else dense


def serves(vllm_config, cache, tokens, sequences=1):
    """Whether vLLM gives so many requests of so many tokens their blocks at the same time."""
    block_size = block_size_of(cache)
    settings = vllm_config(block_size, max_model_len=tokens)
    # vLLM's default for hybrid models, whose blocks have one size without prefix caching only.
    settings.cache_config.enable_prefix_caching = not cache.num_states
    memory = MEMORY - cache.held_out(tokens, sequences)
    try:
        made = planned(settings, layers(*specs(cache, block_size)), memory)
    except ValueError:  # not one request of that length
        return False
    engine = Engine(settings, made)
    prompts = [range(i * tokens, (i + 1) * tokens) for i in range(sequences)]
    return all(engine.start(engine.request(str(ids), ids)) for ids in prompts)


def block_size_of(cache):
    """Tokens of a block as the plugin aligns them with states."""
    states = max(layer.state_bytes for layer in cache.model.layers)
    sizes = {cache.layer_bytes(layer) for layer in cache.model.layers if layer.kv_heads}
    return hybrid_alignment(sizes, states, 16, 16)[0]


@every_cache
def test_the_engine_plans_the_same_number_of_blocks(vllm_config, cache):
    tokens = 64
    settings = vllm_config(block_size_of(cache), max_model_len=tokens)
    memory = MEMORY - cache.held_out(tokens)
    theirs = planned(settings, layers(*specs(cache, block_size_of(cache))), memory)
    assert theirs.num_blocks == cache.num_blocks(MEMORY, tokens)


@every_cache
def test_a_request_gets_the_longest_context_and_not_one_token_more(vllm_config, cache):
    longest = answer(cache).max_context
    assert serves(vllm_config, cache, longest)
    assert not serves(vllm_config, cache, longest + 1)


@every_cache
def test_as_many_requests_run_as_planned_and_not_one_more(vllm_config, cache):
    tokens = 100
    most = answer(cache, context=tokens).max_concurrency
    assert serves(vllm_config, cache, tokens, most)
    assert not serves(vllm_config, cache, tokens, most + 1)
