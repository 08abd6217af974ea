from pathlib import Path

import pytest

from vllm_metal_tq.config import T3, TurboQuantConfig
from vllm_metal_tq.integrations.vllm.settings import KEYS, Settings


def parse(**given):
    return Settings.parse({"turboquant": True} | given)


@pytest.mark.parametrize("given", [{}, {"turboquant": False}, {"other": 1}])
def test_nothing_happens_unless_it_is_turned_on(given):
    assert Settings.parse(given) is None


def test_without_names_it_is_the_default_preset_with_calibration():
    assert parse() == Settings(TurboQuantConfig(4, 4))
    assert parse().calibration is True


def test_every_name_is_taken():
    got = parse(preset="tq6", v_quant="t3", block_size=32, calibration="c.safetensors")
    assert got == Settings(TurboQuantConfig(6, T3, 32), calibration="c.safetensors")
    assert parse(calibration=False).calibration is False


@pytest.mark.parametrize(
    "given", ["0-1=tq8,29=q8_0/q6_0,4-5=bf16", {"0-1": "tq8", "29": "q8_0/q6_0", "4-5": "bf16"}]
)
def test_layers_have_widths_of_their_own_or_stay_as_they_are(given):
    got = parse(layer_overrides=given)
    assert got.for_layer(1) == TurboQuantConfig(8, 6)
    assert got.for_layer(29) == TurboQuantConfig(8, 6)
    assert got.for_layer(3) == TurboQuantConfig(4, 4)
    assert got.for_layer(4) is got.for_layer(5) is None
    assert got.label == "tq4,0-1=tq8,29=tq8,4=bf16,5=bf16"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"turboquant": "yes"}, "turboquant must be bool, not str 'yes'"),
        ({"presets": "tq4"}, "'presets' is unknown; known keys: turboquant, preset, k_quant"),
        ({"preset": "tq5"}, "preset 'tq5' is unknown: allowed are tq8, tq6, tq4"),
        ({"preset": 4}, "preset must be str, not int 4"),
        ({"k_quant": "q7_0"}, "k_quant 'q7_0' is unknown: allowed are"),
        ({"block_size": True}, "block_size must be int, not bool True"),
        ({"block_size": 24}, "block_size 24 is unknown: allowed are 16, 32"),
        ({"layer_overrides": ["0"]}, "layer_overrides must be str or dict, not list"),
        ({"layer_overrides": {"x": "tq8"}}, "expected such as 0-1=tq8"),
        ({"layer_overrides": {"x": "bf16"}}, "'x=bf16' names no layers"),
        ({"layer_overrides": {"5-2": "bf16"}}, "'5-2=bf16' names no layers"),
        ({"layer_overrides": {"5-2": "tq8"}}, "layers 5-2 are no range"),
        ({"layer_overrides": {"0-99999999999": "bf16"}}, "more layers than any model has"),
        ({"layer_overrides": "99999999999=bf16"}, "the last may be 9999"),
        ({"calibration": 1}, "calibration must be str or bool, not int 1"),
    ],
)
def test_what_is_not_known_is_refused_by_name(given, complaint):
    with pytest.raises(ValueError, match="--additional-config") as caught:
        Settings.parse({"turboquant": True} | given)
    assert complaint in str(caught.value)


def test_what_vllm_itself_adds_is_let_through():
    assert parse(gdn_prefill_backend="auto") == parse()


def test_every_key_is_documented():
    text = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in text] == []
