"""What of a prompt cache is compressed, and whether it can be batched."""

import mlx_lm.models.cache as host
import pytest
from models import llama

from vllm_metal_tq import TurboQuantKVCache, make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm.fetched import FetchedKVCache
from vllm_metal_tq.integrations.mlx_lm.parts import batchable, compressed, keys_of, with_keys


@pytest.fixture(scope="module")
def ours():
    return make_prompt_cache(llama())[0]


def test_a_cache_is_batchable_with_its_like_and_with_states(ours):
    assert isinstance(ours, TurboQuantKVCache)
    assert batchable([ours, ours])
    assert batchable([host.KVCache(), host.KVCache()])
    assert batchable([ours, host.ArraysCache(2), host.CacheList(host.ArraysCache(2), ours)])


def test_compressed_caches_are_not_batched_beside_others(ours):
    assert not batchable([ours, host.KVCache()])
    assert not batchable([host.CacheList(host.ArraysCache(2), host.KVCache()), ours])


def test_caches_that_cannot_be_merged_are_not_batched(ours):
    assert not batchable([FetchedKVCache(ours.pool)])


def test_the_cache_of_keys_is_replaced_where_it_stands(ours):
    state, keys = host.ArraysCache(2), host.KVCache()
    several = host.CacheList(state, keys)
    assert keys_of(several) is keys
    assert list(with_keys(several, ours).caches) == [state, ours]
    assert compressed(with_keys(several, ours)) is ours
    assert compressed(several) is None
