import pickle
from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

import torch
import vllm
from planning import HEADS, dense, field_values, packed, sliding, state
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from vllm_metal_tq.config import BLOCK_SIZES, PRESETS, T2, T3, WIDTHS, TurboQuantConfig
from vllm_metal_tq.integrations.vllm import spec as spec_module
from vllm_metal_tq.integrations.vllm.spec import (
    TurboQuantAttentionSpec,
    TurboQuantSlidingWindowSpec,
    check_page_size,
    compressed,
    hybrid_alignment,
    token_bytes,
)
from vllm_metal_tq.layout import PageLayout

KINDS = pytest.mark.parametrize("kind", [dense, sliding])


def attention(**changes):
    """A compressed layer's spec, 8-bit keys and 6-bit values."""
    given = {"block_size": 16, "num_kv_heads": HEADS, "head_size": 128, "dtype": torch.uint8}
    return TurboQuantAttentionSpec(**{**given, "k_width": 8, "v_width": 6, **changes})


@KINDS
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_block_is_a_page_of_the_layout_for_each_kv_head(kind, width, head_dim, block_size):
    config = TurboQuantConfig(width, 4, block_size)
    spec = compressed(kind(head_dim, block_size), config)
    assert spec.page_size_bytes == HEADS * PageLayout(config, head_dim).page_bytes


@KINDS
def test_a_large_block_is_several_pages(kind):
    config = TurboQuantConfig(4, 4, block_size=32)
    spec = compressed(kind(block_size=544), config)
    assert spec.page_size_bytes == 17 * HEADS * PageLayout(config, 128).page_bytes


@KINDS
def test_every_name_for_the_bytes_of_a_block_says_the_same(kind):
    spec = packed("tq4", kind())
    assert spec.real_page_size_bytes == spec.unpadded_page_size_bytes == spec.page_size_bytes
    assert 16 * HEADS * spec.state_content_size_bytes == spec.page_size_bytes


@KINDS
def test_padding_is_kept(kind):
    spec = replace(packed("tq4", kind()), page_size_padded=8192)
    assert spec.page_size_bytes == 8192
    assert spec.unpadded_page_size_bytes == 16 * HEADS * 132


def test_a_block_of_other_tokens_has_other_bytes():
    assert attention().copy_with_new_block_size(48).page_size_bytes == 48 * HEADS * 228


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"block_size": 24}, "block_size 24 does not fit .* multiple of 16"),
        ({"head_size": 7}, "head_dim 7 cannot be rotated"),
        ({"head_size_v": 64}, "keys of 128 and values of 64 elements cannot be compressed"),
        ({"k_width": 7}, "k_width 7 is unknown"),
        ({"v_width": 1}, "v_width 1 is unknown"),
        ({"dtype": torch.bfloat16}, "dtype torch.bfloat16: compressed pages are torch.uint8"),
    ],
)
def test_what_has_no_layout_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        attention(**changes)


@KINDS
def test_merging_equal_layers_keeps_every_field(kind):
    spec = replace(packed("tq4", kind()), page_size_padded=8192)
    assert type(spec).merge([spec, replace(spec), replace(spec)]) == spec


def test_merging_keeps_fields_that_a_newer_version_adds():
    @dataclass(frozen=True, kw_only=True)
    class Newer(TurboQuantAttentionSpec):
        added: str = "nothing"

    spec = Newer(**field_values(attention()), added="something")
    assert Newer.merge([spec, replace(spec)]).added == "something"
    with pytest.raises(AssertionError):
        Newer.merge([spec, replace(spec, added="something else")])


@pytest.mark.parametrize(
    "change",
    [
        {"k_width": 4},
        {"v_width": 4},
        {"head_size": 64, "head_size_v": 64},
        {"num_kv_heads": 4},
        {"block_size": 32},
        {"page_size_padded": 8192},
        {"sliding_window": 1024},
        {"non_causal": True},
    ],
)
def test_layers_that_differ_are_not_merged(change):
    # vLLM takes an AssertionError for "plan these layers one by one", any other error is fatal.
    with pytest.raises(AssertionError, match="share no spec"):
        TurboQuantAttentionSpec.merge([attention(), attention(**change)])


def test_compressed_and_dense_layers_are_not_merged_in_either_order():
    for pair in ([dense(), packed()], [packed(), dense()]):
        with pytest.raises(AssertionError):
            pair[0].merge(pair)


@KINDS
def test_the_compressed_twin_keeps_every_field_but_the_dtype(kind):
    spec = replace(kind(), page_size_padded=65_536)
    if "non_causal" in {field.name for field in fields(spec)}:
        spec = replace(spec, non_causal=True, attention_chunk_size=512)
    twin = compressed(spec, TurboQuantConfig(5, 3))
    assert field_values(twin) == {
        **field_values(spec),
        "dtype": torch.uint8,
        "k_width": 5,
        "v_width": 3,
    }


@KINDS
def test_a_twin_is_still_what_vllm_knows(kind):
    twin = packed("tq4", kind())
    assert isinstance(twin, type(kind()))
    assert type(twin) in (TurboQuantAttentionSpec, TurboQuantSlidingWindowSpec)


@dataclass(frozen=True, kw_only=True)
class StrangeSpec(FullAttentionSpec):
    """A layer that stores something else."""


def mla():
    return MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "spec",
    [mla, packed, lambda: state(4096, 16), lambda: StrangeSpec(**field_values(dense()))],
    ids=["MLA", "compressed already", "Mamba", "another subclass"],
)
def test_other_kinds_of_layers_have_no_twin(spec):
    with pytest.raises(TypeError, match="Spec cannot be compressed: only FullAttentionSpec and"):
        compressed(spec(), TurboQuantConfig(4, 4))


def test_the_config_of_a_whole_model_is_refused():
    config = TurboQuantConfig.from_names("tq4", layers="0-1=tq8")
    with pytest.raises(ValueError, match="for_layer"):
        compressed(dense(), config)
    assert compressed(dense(), config.for_layer(0)).k_width == 8


def test_a_block_that_is_half_a_page_is_refused():
    with pytest.raises(ValueError, match="blocks of 16 tokens are not made of pages of 32"):
        compressed(dense(block_size=16), TurboQuantConfig(4, 4, block_size=32))


@KINDS
@pytest.mark.parametrize("preset", ["tq8", "tq3"])
def test_specs_travel_between_processes(kind, preset):
    spec = packed(preset, kind())
    copy = pickle.loads(pickle.dumps(spec))
    assert copy == spec
    assert hash(copy) == hash(spec)
    assert copy.page_size_bytes == spec.page_size_bytes


def test_scalar_and_trellis_codes_of_as_many_bits_take_as_much_but_are_not_merged():
    scalar, trellis = attention(k_width=3, v_width=2), attention(k_width=T3, v_width=T2)
    assert scalar.page_size_bytes == trellis.page_size_bytes
    with pytest.raises(AssertionError, match="share no spec"):
        TurboQuantAttentionSpec.merge([scalar, trellis])


def test_this_version_of_vllm_plans_with_our_bytes():
    check_page_size()


@pytest.mark.parametrize("name", ["TurboQuantAttentionSpec", "TurboQuantSlidingWindowSpec"])
def test_a_version_that_ignores_our_bytes_is_refused_by_name(name, monkeypatch):
    ignores = property(lambda self: 4 * self.block_size * self.num_kv_heads * self.head_size)
    monkeypatch.setattr(getattr(spec_module, name), "page_size_bytes", ignores)
    with pytest.raises(RuntimeError, match=f"vLLM {vllm.__version__} is not supported: it plans"):
        check_page_size()


def test_a_hybrid_model_s_block_covers_the_state():
    # Qwen3.5-like: 2 KV heads of 256, a state of 1.1 MB; dense blocks of 544 tokens covered it.
    size = token_bytes(TurboQuantConfig(4, 4), 2, 256)
    assert size == 2 * 260
    assert hybrid_alignment([size] * 6, 544 * 2048, 16, 544) == (2144, 2144 * 520)


def test_a_state_that_fills_its_page_is_not_padded():
    assert hybrid_alignment([132], 132 * 64, 16, 16) == (64, None)


def test_a_block_that_is_large_enough_is_kept():
    assert hybrid_alignment([132], 132 * 64, 16, 4096) == (4096, 132 * 4096)


def test_a_model_without_states_is_left_alone():
    assert hybrid_alignment([132, 68], 0, 16, 16) == (16, None)


@given(
    size=st.integers(1, 10_000),
    state_bytes=st.integers(1, 10_000_000),
    alignment=st.sampled_from([1, 16, 24, 32, 64]),
    before=st.integers(1, 5000),
)
def test_hybrid_pages_are_equal_aligned_and_as_small_as_can_be(
    size, state_bytes, alignment, before
):
    block_size, padded = hybrid_alignment([size, size], state_bytes, alignment, before)
    assert block_size % alignment == block_size % 16 == 0
    assert block_size >= before
    assert (padded or state_bytes) == block_size * size
    shorter = block_size - max(alignment, 48 if alignment == 24 else 16)
    assert shorter < before or shorter * size < state_bytes


def test_hybrid_layers_of_different_sizes_end_in_one_clear_error():
    with pytest.raises(ValueError, match="without layer_overrides: theirs take 132, 228 bytes"):
        hybrid_alignment([228, 132, 132], 100_000, 16, 16)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_no_two_presets_have_tokens_that_a_planner_could_make_equal(head_dim):
    sizes = [token_bytes(TurboQuantConfig(*widths), 1, head_dim) for widths in PRESETS.values()]
    assert not any(a % b == 0 for a in sizes for b in sizes if a != b)
