import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_tq import TurboQuantConfig
from vllm_metal_tq.centre import Centre
from vllm_metal_tq.part import Part

STAGE = Part(layers=3, first=4, num_layers=10, fingerprint="f")  # layers 4, 5 and 6
SHARE = Part(layers=2, first=0, num_layers=2, share=1, shares=3, fingerprint="f")


@pytest.mark.parametrize(
    ("whole", "own"),
    [("0-9=tq8", "0-2=tq8"), ("5=tq8", "1=tq8"), ("0-4=tq8,6-7=tq3", "0=tq8,2=tq3")],
)
def test_a_stage_counts_its_layers_from_its_first(whole, own):
    config = TurboQuantConfig.from_names(layers=whole)
    assert STAGE.config(config) == TurboQuantConfig.from_names(layers=own)
    for layer in range(3):
        ours = STAGE.config(config).for_layer(layer)
        assert ours == config.for_layer(layer + 4)


def test_what_concerns_other_stages_is_left_out():
    config = TurboQuantConfig.from_names(layers="0-3=tq8,7-9=tq3")
    assert STAGE.config(config) == TurboQuantConfig.from_names()


def test_a_layer_that_the_whole_model_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="there is no layer 10: the model has 10"):
        STAGE.config(TurboQuantConfig.from_names(layers="10=tq8"))


def centre(heads):
    pairs = np.array([[0, 1, 0]], np.uint32)
    of_heads = mx.arange(heads * 2, dtype=mx.float32).reshape(heads, 2)
    return Centre(pairs, of_heads, of_heads + 1, of_heads + 2)


def test_a_share_takes_the_means_of_its_own_heads():
    first, none = SHARE.centres([centre(6), None])
    assert none is None
    for i, part in enumerate((first.mu, first.smoothing, first.value_mean)):
        assert part.tolist() == [[4.0 + i, 5.0 + i], [6.0 + i, 7.0 + i]]


def test_a_stage_takes_its_layers_whole():
    every = [centre(2) for _ in range(10)]
    assert STAGE.centres(every) == tuple(every[4:7])


def test_a_calibration_of_another_number_of_layers_is_an_error():
    with pytest.raises(ValueError, match="a model of another shape"):
        STAGE.centres([None] * 9)
