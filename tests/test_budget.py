import mlx.core as mx
import pytest
from models import llama, tokens

from vllm_metal_tq import TurboQuantConfig, budget, safetensors
from vllm_metal_tq.config import bits_of
from vllm_metal_tq.evaluate import compressed
from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.sweep import measure


def widths(config, layers):
    return [(own.k_width, own.v_width) for own in map(config.for_layer, range(layers))]


def average(config, layers, head_dim=64):
    own = [PageLayout(config.for_layer(layer), head_dim) for layer in range(layers)]
    return sum(layout.bits_per_element for layout in own) / layers


def test_layers_that_matter_alike_get_the_same():
    config = budget.assign([(1.0, 1.0)] * 4, 4.25, [64] * 4)
    assert widths(config, 4) == [(4, 4)] * 4


@pytest.mark.parametrize(("bits", "label"), [(2.25, "tq2"), (3.25, "tq3")])
def test_of_few_bits_codes_are_trellis_codes(bits, label):
    assert budget.assign([(1.0, 1.0)], bits, [64]).for_layer(0).label == label


def test_what_matters_more_gets_more_bits():
    found = [(1.0, 1.0), (64.0, 1.0), (1.0, 1.0), (1.0, 1 / 64)]
    config = budget.assign(found, 4.25, [64] * 4)
    got = [[bits_of(width) for width in pair] for pair in widths(config, 4)]
    assert got[1][0] > got[0][0] > got[3][1]
    assert got[0][0] == got[2][0]


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.0, 3.5, 4.0, 5.7, 8.25, 20.0])
def test_the_budget_is_kept_and_used(bits):
    found = [(2.0**i, 3.0 ** (i % 3)) for i in range(10)]
    got = average(budget.assign(found, bits, [64] * 10), 10)
    assert got <= bits + 1e-9
    assert got > min(bits, 8.25) - 2 / 20 - 1e-9  # the last step that fits may be of two bits


def test_layers_that_are_not_compressed_count_for_nothing():
    config = budget.assign([None, (1.0, 1.0), None], 4.25, [None, 64, None])
    assert config.for_layer(1).label == "tq4"
    assert [first for first, *_ in config.layer_overrides] == [1]


@pytest.mark.parametrize("bits", [-1, 0, 2.2])
def test_a_budget_below_the_smallest_widths_is_refused(bits):
    with pytest.raises(ValueError, match=r"too few: the smallest widths take 2\.25"):
        budget.assign([(1.0, 1.0)], bits, [64])


def test_the_layer_whose_values_speak_loudest_is_found():
    model, ids = llama(), tokens(161)[0].tolist()
    for quiet in (model.layers[0].self_attn, model.layers[2].self_attn):
        quiet.o_proj.weight = 0.1 * quiet.o_proj.weight
    calibration = calibrate(model, ids)
    found = budget.sensitivities(model, ids, calibration)
    assert len(found) == 3
    assert max(range(3), key=lambda i: found[i][1]) == 1
    assert all(kl > 0 for halves in found for kl in halves)


def test_of_one_layer_it_measures_what_evaluation_does():
    model, ids = llama(num_hidden_layers=1), tokens(161)[0].tolist()
    calibration, window = calibrate(model, ids), len(ids) - 1
    methods = [
        compressed(model, TurboQuantConfig(*widths), window, calibration=calibration)
        for widths in ((budget.PROBED, budget.FINE), (budget.FINE, budget.PROBED))
    ]
    points = measure(model, ids, methods, window=window, tokens=window)
    (halves,) = budget.sensitivities(model, ids, calibration)
    assert halves == pytest.approx([point.kl for point in points])


def test_widths_are_kept_in_the_file(tmp_path):
    from dataclasses import replace

    from vllm_metal_tq import calibration, make_prompt_cache

    model = llama()
    config = budget.assign([(1.0, 2.0), (9.0, 1.0), (1.0, 1.0)], 4.0, [64] * 3)
    measured = replace(calibrate(model, tokens(100)[0].tolist()), config=config)
    measured.save(tmp_path / "c.safetensors")
    loaded = calibration.load(tmp_path / "c.safetensors", model)
    assert loaded.config == config
    _, metadata = safetensors.read(tmp_path / "c.safetensors")
    assert "tq" not in metadata["widths"]  # what presets stand for may change
    caches = make_prompt_cache(model, calibration=loaded)
    assert [c.layout.config for c in caches] == [config.for_layer(i) for i in range(3)]
    assert mx.array_equal(caches[2].sequences.centre.mu, measured.centres[2].mu)
