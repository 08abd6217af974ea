import re

import pytest

from vllm_metal_tq.config import (
    BLOCK_SIZES,
    SCALAR_WIDTHS,
    T2,
    T3,
    WIDTHS,
    TurboQuantConfig,
    bits_of,
)
from vllm_metal_tq.layout import SUB_BLOCK

VLLM_METAL_KEYS = ["q8_0", "q5_0", "q4_0", "int8", "uint8", "int4", "uint4", "int2", "uint2"]
VLLM_METAL_VALUES = ["q2_0", "q3_0", "q4_0", "q5_0", "q8_0"]


def test_the_default_is_tq4():
    assert TurboQuantConfig.from_names() == TurboQuantConfig(4, 4)


@pytest.mark.parametrize(
    ("preset", "widths"),
    [("tq8", (8, 6)), ("tq6", (6, 5)), ("tq4", (4, 4)), ("tq3", (T3, T3)), ("tq2", (T2, T2))],
)
def test_presets_name_widths(preset, widths):
    config = TurboQuantConfig.from_names(preset)
    assert (config.k_width, config.v_width) == widths
    assert config.preset == config.label == preset


@pytest.mark.parametrize("name", VLLM_METAL_KEYS)
def test_vllm_metal_key_names_are_accepted(name):
    config = TurboQuantConfig.from_names(k_quant=name)
    assert config.k_width == int("".join(c for c in name.split("_")[0] if c.isdigit()))


@pytest.mark.parametrize("name", VLLM_METAL_VALUES)
def test_vllm_metal_value_names_are_accepted(name):
    assert TurboQuantConfig.from_names(v_quant=name).v_quant == name


NAMES = {T2: "t2", T3: "t3"} | {bits: f"q{bits}_0" for bits in SCALAR_WIDTHS}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_has_a_name_for_keys_and_values(width):
    name = NAMES[width]
    config = TurboQuantConfig.from_names(k_quant=name, v_quant=name)
    assert config == TurboQuantConfig(width, width)
    assert (config.k_quant, config.v_quant) == (name, name)
    assert bits_of(width) == int(name[1])


@pytest.mark.parametrize("bits", [2, 3])
def test_scalar_codes_of_as_many_bits_as_a_preset_are_not_the_preset(bits):
    config = TurboQuantConfig(bits, bits)
    assert config.preset is None
    assert config.label == f"q{bits}_0/q{bits}_0"


def test_widths_take_precedence_over_the_preset_each_for_its_half():
    assert TurboQuantConfig.from_names("tq8", v_quant="q3_0") == TurboQuantConfig(8, 3)


def test_widths_without_a_preset_are_labelled_by_both():
    config = TurboQuantConfig(8, 3)
    assert config.preset is None
    assert config.label == "q8_0/q3_0"


@pytest.mark.parametrize(
    ("names", "given", "allowed"),
    [
        ({"preset": "tq5"}, "'tq5'", "tq8, tq6, tq4, tq3, tq2"),
        ({"k_quant": "q7_0"}, "'q7_0'", "q8_0"),
        ({"v_quant": ""}, "''", "q8_0"),
        ({"block_size": 64}, "64", "16, 32"),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_allowed(names, given, allowed):
    with pytest.raises(ValueError, match=rf"{next(iter(names))} {given} is unknown") as error:
        TurboQuantConfig.from_names(**names)
    assert allowed in str(error.value)


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, 17, 20, -4])
def test_an_unknown_width_is_refused(bits):
    allowed = re.escape("allowed are 2, 3, 4, 5, 6, 8, T2 (18), T3 (19)") + "$"
    with pytest.raises(ValueError, match=f"k_width {bits} is unknown: {allowed}"):
        TurboQuantConfig(bits, 4)
    with pytest.raises(ValueError, match=f"v_width {bits} is unknown: {allowed}"):
        TurboQuantConfig(4, bits)


def test_block_sizes_fill_sub_blocks():
    assert all(size % SUB_BLOCK == 0 for size in BLOCK_SIZES)


class TestLayers:
    def test_some_layers_have_widths_of_their_own(self):
        config = TurboQuantConfig.from_names("tq4", layers="0-1=tq8, 29=q8_0/q6_0,1=q3_0/q2_0")
        assert config.for_layer(0) == TurboQuantConfig(8, 6)
        assert config.for_layer(1) == TurboQuantConfig(3, 2)
        assert config.for_layer(2) == config.for_layer(28) == TurboQuantConfig(4, 4)
        assert config.for_layer(29) == TurboQuantConfig(8, 6)

    def test_names_come_back(self):
        names = "0-1=tq8,2=tq3,28=q8_0/t2,29=q8_0/q3_0"
        config = TurboQuantConfig.from_names(layers=names)
        assert config.layers == names
        assert config.label == f"tq4,{names}"
        assert TurboQuantConfig.from_names(layers=config.layers) == config
        assert TurboQuantConfig.from_names().layers == ""

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ("0-1", "expected such as 0-1=tq8"),
            ("0:tq8", "expected such as"),
            ("1-0=tq8", "layers 1-0 are no range"),
            ("0=tq7", "preset 'tq7' is unknown"),
            ("0=q4_0/q7_0", "v_quant 'q7_0' is unknown"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, layers, message):
        with pytest.raises(ValueError, match=message):
            TurboQuantConfig.from_names(layers=layers)
