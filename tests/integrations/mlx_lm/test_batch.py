"""Sequences in a batch are what they are alone, whoever joins and leaves, and share pages."""

import copy
from itertools import pairwise

import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from models import llama, tokens
from rows import rows_of

from vllm_metal_tq import TurboQuantConfig, make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm import CachePools
from vllm_metal_tq.pages import OutOfBlocks

ROUNDING = 5e-4  # of logits: a GPU splits the work of several sequences otherwise than of one
PROMPTS = [tokens(n, seed=n)[0].tolist() for n in (5, 40, 17, 90, 33, 64, 1, 150)]


KINDS = {
    "full": {},
    "windows": {
        "sliding_window": 40,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
}
every_kind = pytest.mark.parametrize("model", KINDS, indirect=True)


@pytest.fixture(scope="module")
def model(request):
    return llama(**KINDS[getattr(request, "param", "full")])


@pytest.fixture
def pools(model):
    pools = CachePools(model, TurboQuantConfig(4, 4))
    pools.attach()
    yield pools
    pools.detach()


def alone(model, prompt, count, config=None):
    """Greedy tokens of one prompt, which goes through the model as BatchGenerator does it."""
    cache = make_prompt_cache(model, config or TurboQuantConfig(4, 4))
    if len(prompt) > 1:
        model(mx.array([prompt[:-1]]), cache=cache)
    last, found = prompt[-1], []
    for _ in range(count):
        last = mx.argmax(model(mx.array([[last]]), cache=cache)[0, -1]).item()
        found.append(last)
    return found


def batched(generator, wanted):
    """Tokens by uid until each of ``wanted`` has finished."""
    found, open_ = {}, set(wanted)
    while open_:
        for response in generator.next()[1]:
            found.setdefault(response.uid, []).append(response.token)
            if response.finish_reason:
                open_.discard(response.uid)
    return found


@every_kind
def test_eight_prompts_that_join_and_leave_are_what_they_are_alone(model, pools):
    lengths = [20, 3, 12, 30, 7, 25, 16, 9]
    generator = BatchGenerator(model, completion_batch_size=5, prefill_batch_size=2)
    uids = generator.insert(PROMPTS[:5], lengths[:5])
    found = {}
    for _ in range(6):
        for response in generator.next()[1]:
            found.setdefault(response.uid, []).append(response.token)
    uids += generator.insert(PROMPTS[5:], lengths[5:])
    open_ = set(uids) - {uid for uid, some in found.items() if len(some) >= lengths[uid]}
    for uid, some in batched(generator, open_).items():
        found.setdefault(uid, []).extend(some)
    for uid, prompt, count in zip(uids, PROMPTS, lengths, strict=True):
        assert found[uid] == alone(model, prompt, count)
    del generator
    assert pools.used_blocks == 0


@pytest.mark.parametrize("preset", ["tq3", "tq2"])
def test_trellis_codes_in_a_batch_are_what_they_are_alone(model, preset):
    config = TurboQuantConfig.from_names(preset)
    pools = CachePools(model, config)
    pools.attach()
    try:
        generator = BatchGenerator(model)
        uids = generator.insert(PROMPTS[:3], [6] * 3)
        found = batched(generator, uids)
    finally:
        pools.detach()
    for uid, prompt in zip(uids, PROMPTS, strict=False):
        assert found[uid] == alone(model, prompt, 6, config)


def test_a_sequence_that_is_removed_frees_its_blocks_and_leaves_the_others_alone(model, pools):
    generator = BatchGenerator(model)
    uids = generator.insert(PROMPTS[:4], [15] * 4)
    for _ in range(5):
        generator.next()
    before = pools.used_blocks
    generator.remove(uids[1:2])
    assert pools.used_blocks < before
    found = batched(generator, [uids[0], *uids[2:]])
    assert found[uids[3]][-5:] == alone(model, PROMPTS[3], 15)[-5:]


def merged(model, pools, lengths):
    caches = [pools.make_prompt_cache() for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        model(tokens(length, seed=length), cache=cache)
    return caches, [caches[0][i].merge([c[i] for c in caches]) for i in range(len(caches[0]))]


def test_merging_copies_no_page_and_leaves_the_caches_as_they_are(model, pools):
    caches, batch = merged(model, pools, (40, 70))
    used = pools.used_blocks
    rows = rows_of(caches[1][0].sequences.tables[0])
    assert used == -(-40 // 16) + -(-70 // 16)
    model(tokens(1, batch=2), cache=batch)
    assert [c[0].offset for c in caches] == [40, 70]
    assert np.array_equal(rows_of(caches[1][0].sequences.tables[0]), rows)
    assert pools.used_blocks == used + 2  # the last blocks were shared, now each has its own


@every_kind
@pytest.mark.parametrize("count", [1, 5, 20])
def test_right_padding_is_not_stored_nor_seen(model, pools, count):
    _, batch = merged(model, pools, (40, 70, 3))
    lengths = [count, max(count - 3, 1), count]
    chunk = tokens(count, seed=7, batch=3)
    for cache in batch:
        cache.prepare(lengths=lengths, right_padding=[count - n for n in lengths])
    out = model(chunk, cache=batch)
    for cache in batch:
        cache.finalize()
    assert batch[-1].sequences.lengths == [40 + lengths[0], 70 + lengths[1], 3 + lengths[2]]
    after = model(tokens(1, seed=9, batch=3), cache=batch)
    for i, (length, own) in enumerate(zip((40, 70, 3), lengths, strict=True)):
        cache = make_prompt_cache(model, TurboQuantConfig(4, 4))
        model(tokens(length, seed=length), cache=cache)
        expected = model(chunk[i : i + 1, :own], cache=cache)
        assert mx.abs(out[i, :own] - expected[0]).max().item() < ROUNDING
        expected = model(tokens(1, seed=9, batch=3)[i : i + 1], cache=cache)
        assert mx.abs(after[i] - expected[0]).max().item() < ROUNDING


@every_kind
def test_left_padding_is_not_stored_nor_seen(model, pools):
    padding, chunk = [0, 13, 29], tokens(30, seed=3, batch=3)
    caches = [pools.make_prompt_cache() for _ in padding]
    batch = [caches[0][i].merge([c[i] for c in caches]) for i in range(len(caches[0]))]
    for cache in batch:
        cache.prepare(left_padding=padding)
    out = mx.concatenate([model(part, cache=batch) for part in (chunk[:, :20], chunk[:, 20:])], 1)
    assert batch[0].offset.tolist() == [30, 17, 1]
    for i, left in enumerate(padding):
        cache = make_prompt_cache(model, TurboQuantConfig(4, 4))
        ends = sorted({0, max(20 - left, 0), 30 - left})
        parts = [chunk[i : i + 1, left + a : left + b] for a, b in pairwise(ends)]
        expected = mx.concatenate([model(part, cache=cache) for part in parts], axis=1)
        assert mx.abs(out[i, left:] - expected[0]).max().item() < ROUNDING


@every_kind
def test_extracted_sequences_go_on_alone(model, pools):
    caches, batch = merged(model, pools, (40, 70))
    step = tokens(1, seed=5, batch=2)
    model(step, cache=batch)
    single = [cache.extract(1) for cache in batch]
    model(step[1:], cache=caches[1])
    assert single[0].offset == 71
    ours, theirs = (model(tokens(2, seed=6), cache=cache) for cache in (single, caches[1]))
    assert mx.abs(ours - theirs).max().item() < ROUNDING


def test_caches_of_other_pools_join_by_copy(model, pools):
    other = make_prompt_cache(model, TurboQuantConfig(4, 4))
    model(tokens(50), cache=other)
    _, batch = merged(model, pools, (40,))
    for cache, joining in zip(batch, other, strict=True):
        cache.extend(joining.merge([joining]))
    assert pools.used_blocks == 3 + 4
    step = tokens(1, batch=2)
    out = model(step, cache=batch)
    expected = model(step[1:], cache=other)
    assert mx.abs(out[1] - expected[0]).max().item() < ROUNDING


def test_a_common_prefix_is_held_once(model, pools):
    prefix = pools.make_prompt_cache()
    model(tokens(2048), cache=prefix)
    held = pools.used_bytes
    requests = [copy.deepcopy(prefix) for _ in range(8)]
    assert pools.used_bytes == held == 2048 // 16 * pools.block_bytes
    for i, cache in enumerate(requests):
        model(tokens(20, seed=i), cache=cache)
    assert pools.used_bytes == held + 8 * 2 * pools.block_bytes
    cold = pools.make_prompt_cache()
    model(tokens(2048), cache=cold)
    model(tokens(20, seed=3), cache=cold)
    last = tokens(1, seed=11)
    assert mx.array_equal(model(last, cache=cold), model(last, cache=requests[3]))


def test_generation_beyond_the_budget_stops_and_stores_nothing(model):
    pools = CachePools(model, max_bytes=0x7FFF_FFFF)
    pools = CachePools(model, max_bytes=4 * pools.block_bytes)
    assert pools.max_blocks == 4
    cache = pools.make_prompt_cache()
    model(tokens(60), cache=cache)
    with pytest.raises(OutOfBlocks, match="4 of 4 are in use"):
        model(tokens(5), cache=cache)
    assert {layer.size() for layer in cache} == {60}
    out = model(tokens(4), cache=cache)
    assert mx.isfinite(out).all()


def test_a_budget_below_one_block_is_refused(model):
    with pytest.raises(ValueError, match="one block of 16 tokens takes"):
        CachePools(model, max_bytes=100)


def test_attached_pools_serve_mlx_lm_and_leave_no_trace(model, pools):
    assert host.make_prompt_cache(model)[0].pool is pools.pools[0]
    own = make_prompt_cache(model)
    assert own[0].pool is not pools.pools[0]
    pools.detach()
    assert type(host.make_prompt_cache(model)[0]) is host.KVCache


def test_a_limited_batch_drops_old_blocks_of_each_sequence(model):
    config = TurboQuantConfig(8, 8)
    pools = CachePools(model, config, max_kv_size=48)
    _, batch = merged(model, pools, (40, 10))
    alone_ = []
    for length in (40, 10):
        cache = make_prompt_cache(model, config, max_kv_size=48)
        model(tokens(length, seed=length), cache=cache)
        alone_.append(cache)
    for seed in range(60):
        step = tokens(1, seed=seed, batch=2)
        out = model(step, cache=batch)
        for i, cache in enumerate(alone_):
            expected = model(step[i : i + 1], cache=cache)
            assert mx.abs(out[i] - expected[0]).max().item() < ROUNDING
    assert max(batch[0].sequences.lengths) <= 48


@pytest.mark.parametrize("model", ["windows"], indirect=True)
def test_a_budget_counts_what_grows_with_a_sequence(model):
    one = CachePools(model).pools[2].block_bytes
    pools = CachePools(model, max_bytes=10 * one)
    assert (pools.max_blocks, pools.block_bytes) == (10, one)
    cache = pools.make_prompt_cache()
    for seed in range(20):
        model(tokens(8, seed=seed), cache=cache)
    assert (pools.used_blocks, pools.num_blocks) == (10, 10)
    assert pools.used_bytes == sum(layer.nbytes - layer.sequences.tail.nbytes for layer in cache)
    with pytest.raises(OutOfBlocks, match="10 of 10 are in use"):
        model(tokens(1), cache=cache)
    assert cache[2].size() == cache[2].offset == 160


@pytest.mark.parametrize("model", ["windows"], indirect=True)
def test_a_fork_of_a_prefix_holds_what_its_windows_see(model, pools):
    prefix = pools.make_prompt_cache()
    model(tokens(300), cache=prefix)
    forks = [copy.deepcopy(prefix) for _ in range(3)]
    for i, cache in enumerate(forks):
        for step in range(60):
            model(tokens(1, seed=100 * i + step), cache=cache)
    cold = pools.make_prompt_cache()
    model(tokens(300), cache=cold)
    for step in range(60):
        model(tokens(1, seed=100 + step), cache=cold)
    last = tokens(1, seed=11)
    assert mx.array_equal(model(last, cache=cold), model(last, cache=forks[1]))
    del cold
    assert prefix[0].size() == 300
    assert forks[0][0].size() < 40 + 22 + 16
