import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

from dataclasses import replace

from planning import (
    HEADS,
    Engine,
    dense,
    layers,
    packed,
    page_sizes,
    planned,
    sliding,
    state,
)
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.kv_cache_interface import MambaSpec, UniformTypeKVCacheSpecs

from vllm_metal_tq.config import BLOCK_SIZES, PRESETS, TurboQuantConfig
from vllm_metal_tq.integrations.vllm.spec import compressed, hybrid_alignment, token_bytes
from vllm_metal_tq.layout import PageLayout

MEMORY = 1 << 30
LAYERS = 6


def preset_layout(preset, head_dim, block_size):
    config = TurboQuantConfig.from_names(preset, block_size=block_size)
    return config, PageLayout(config, head_dim)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_bytes_hold_as_many_more_blocks_as_pages_are_smaller(
    vllm_config, preset, head_dim, block_size
):
    settings = vllm_config(block_size)
    config, layout = preset_layout(preset, head_dim, block_size)
    spec = dense(head_dim, block_size)
    bf16 = planned(settings, layers(*[spec] * LAYERS), MEMORY)
    ours = planned(settings, layers(*[compressed(spec, config)] * LAYERS), MEMORY)
    assert bf16.num_blocks == MEMORY // (LAYERS * HEADS * layout.bf16_page_bytes)
    assert ours.num_blocks == MEMORY // (LAYERS * HEADS * layout.page_bytes)


def test_llama_3_2_1b_holds_148549_tokens_where_bf16_holds_38768(vllm_config):
    memory = 38_768 * 16 * 8 * 64 * 2 * 2
    spec = replace(dense(64), num_kv_heads=8)
    bf16 = planned(vllm_config(), layers(*[spec] * 16), memory)
    ours = planned(vllm_config(), layers(*[packed("tq4", spec)] * 16), memory)
    assert bf16.num_blocks * 16 == 38_768
    assert ours.num_blocks == memory // (16 * 8 * 16 * 68) == 38_768 // 16 * 256 // 68


def test_one_spec_serves_all_layers_of_a_uniform_model(vllm_config):
    (group,) = planned(vllm_config(), layers(*[packed()] * 3), MEMORY).kv_cache_groups
    assert group.kv_cache_spec == packed()


def test_layers_of_different_widths_share_blocks(vllm_config):
    specs = layers(packed("tq8"), packed("tq4"), packed("tq4"), packed("tq2"))
    plan = planned(vllm_config(), specs, MEMORY)
    (group,) = plan.kv_cache_groups
    assert isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
    assert plan.num_blocks == MEMORY // (16 * HEADS * (228 + 132 + 132 + 68))
    assert page_sizes(plan) == {name: spec.page_size_bytes for name, spec in specs.items()}


@pytest.mark.parametrize("first", ["dense", "compressed"])
def test_dense_layers_lie_beside_compressed_ones(vllm_config, first):
    specs = [packed()] * 3 + [dense()]
    if first == "dense":
        specs.reverse()
    plan = planned(vllm_config(), layers(*specs), MEMORY)
    assert len(plan.kv_cache_groups) == 1
    assert plan.num_blocks == MEMORY // (16 * HEADS * (3 * 132 + 512))
    assert sorted(page_sizes(plan).values()) == [16 * HEADS * n for n in (132, 132, 132, 512)]


def test_the_plan_s_tensors_take_what_its_blocks_take(vllm_config):
    specs = layers(packed("tq8"), packed("tq4"), dense())
    plan = planned(vllm_config(), specs, MEMORY)
    ends = []
    for tensor in plan.kv_cache_tensors:
        if hasattr(tensor, "layers"):  # newer versions: parts of one allocation
            ends.append(tensor.offset + len(tensor.layers) * tensor.layer_stride)
        else:
            ends.append(tensor.size + (ends[-1] if ends else 0))
    assert max(ends) == plan.num_blocks * 16 * HEADS * (228 + 132 + 512)


WINDOWED_AND_FULL = [sliding(), sliding(), dense()] * 2
PACKED_WINDOWED_AND_FULL = [packed("tq4", spec) for spec in WINDOWED_AND_FULL]


def test_sliding_windows_and_full_attention_have_pages_of_one_size(vllm_config):
    bf16 = planned(vllm_config(), layers(*WINDOWED_AND_FULL), MEMORY)
    ours = planned(vllm_config(), layers(*PACKED_WINDOWED_AND_FULL), MEMORY)
    assert len(ours.kv_cache_groups) == len(bf16.kv_cache_groups) == 3
    assert set(page_sizes(ours).values()) == {16 * HEADS * 132}
    assert bf16.num_blocks == MEMORY // (2 * 16 * HEADS * 512)
    assert ours.num_blocks == MEMORY // (2 * 16 * HEADS * 132)


def test_a_window_frees_its_blocks_only_where_the_layer_has_one(vllm_config):
    settings = vllm_config()
    engine = Engine(settings, planned(settings, layers(*PACKED_WINDOWED_AND_FULL), MEMORY))
    request = engine.request("long", range(2048))
    engine.start(request)
    request.num_computed_tokens = 2048
    request.append_output_token_ids(1)
    engine.manager.allocate_slots(request, 1)
    groups = engine.manager.get_block_ids("long")
    kept = [sum(block != 0 for block in group) for group in groups]  # 0 stands for a freed one
    assert sorted(kept) == [65, 65, 129]


def test_without_the_hybrid_manager_a_window_is_a_field_of_full_attention(vllm_config):
    settings = vllm_config(hybrid_manager=False)
    specs = layers(packed(), packed("tq4", dense(sliding_window=1024)))
    plan = planned(settings, specs, MEMORY)
    assert len(plan.kv_cache_groups) == 1
    assert plan.num_blocks == MEMORY // (2 * 16 * HEADS * 132)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_hybrid_model_s_attention_pages_are_the_size_of_its_states(vllm_config, preset):
    config = TurboQuantConfig.from_names(preset)
    size = token_bytes(config, HEADS, 128)
    state_bytes = 544 * HEADS * 512  # covered by 544 dense tokens
    block_size, padded = hybrid_alignment([size, size], state_bytes, 16, 544)
    settings = vllm_config(block_size)
    specs = [compressed(dense(block_size=block_size), config)] * 2
    specs += [state(state_bytes, 4096, padded)] * 6
    plan = planned(settings, layers(*specs), MEMORY)
    assert set(page_sizes(plan).values()) == {block_size * size}
    assert [type(group.kv_cache_spec) for group in plan.kv_cache_groups].count(MambaSpec) == 3
    assert plan.num_blocks == MEMORY // (2 * block_size * size)
    assert block_size * size - state_bytes < 16 * size


def test_a_second_request_finds_the_blocks_of_a_common_prefix(vllm_config):
    settings = vllm_config()
    engine = Engine(settings, planned(settings, layers(packed("tq8"), packed("tq4")), MEMORY))
    first, hits = engine.start(engine.request("first", range(100)))
    assert hits == 0
    second, hits = engine.start(engine.request("second", [*range(70), *range(200, 230)]))
    assert hits == 64
    assert second[0][:4] == first[0][:4]
    assert not set(second[0][4:]) & set(first[0])


def test_a_full_cache_refuses_and_takes_a_request_after_another_is_preempted(vllm_config):
    settings = vllm_config(max_model_len=96)
    memory = 10 * LAYERS * packed().page_size_bytes
    engine = Engine(settings, planned(settings, layers(*[packed()] * LAYERS), memory))
    assert engine.manager.block_pool.get_num_free_blocks() == 9  # vLLM keeps one for itself
    running = engine.request("running", range(64))
    waiting = engine.request("waiting", range(1000, 1096))
    assert engine.start(running) is not None
    assert engine.start(waiting) is None
    engine.manager.free(running)
    blocks, _ = engine.start(waiting)
    assert len(blocks[0]) == 6


def test_the_longest_request_that_fits_is_found_with_compressed_bytes(vllm_config):
    memory = 100 * LAYERS * dense().page_size_bytes

    def fitted(spec):
        settings = vllm_config(max_model_len=-1)
        plan = planned(settings, layers(*[spec] * LAYERS), memory)
        return settings.model_config.max_model_len, plan.num_blocks

    bf16, bf16_blocks = fitted(dense())
    ours, our_blocks = fitted(packed())
    kept_back = bf16_blocks - bf16 // 16  # newer versions leave out the null block
    assert (bf16_blocks, our_blocks) == (100, 100 * 512 // 132)
    assert kept_back in (0, 1)
    assert ours == (our_blocks - kept_back) * 16


def test_a_request_that_is_too_long_for_bf16_is_planned_compressed(vllm_config):
    memory = 200 * LAYERS * dense().page_size_bytes
    settings = vllm_config(max_model_len=200 * 16 * 3)
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        planned(settings, layers(*[dense()] * LAYERS), memory)
    assert planned(settings, layers(*[packed()] * LAYERS), memory).num_blocks == 200 * 512 // 132


@pytest.mark.parametrize(
    "specs",
    [[packed] * 4, [packed, packed, dense, lambda: packed("tq8")]],
    ids=["uniform", "mixed"],
)
def test_the_engine_reports_the_concurrency_of_compressed_blocks(vllm_config, specs):
    settings = vllm_config(max_model_len=4000)
    specs = layers(*[spec() for spec in specs])
    plan = planned(settings, specs, MEMORY)
    per_block = sum(spec.page_size_bytes for spec in specs.values())
    reported = get_max_concurrency_for_kv_cache_config(settings, plan)
    assert reported == (MEMORY // per_block) / 250
