"""Keys as some models really make them: huge biases, first tokens unlike all others."""

import centres
import mlx.core as mx
import pytest
from models import llama, tokens
from rows import decoded

from vllm_metal_tq import codec
from vllm_metal_tq.calibration import Calibration
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.evaluate import evaluate
from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.rotation import rotate

TQ4 = TurboQuantConfig.from_names("tq4")


def kl(model, text, calibration):
    return evaluate(model, text, TQ4, window=400, tokens=200, calibration=calibration).kl_mean


def test_huge_key_biases_do_no_harm_with_centring_and_ruin_plain_rotation():
    """A bias of 100 times the keys' length in a few pairs, slow ones.

    Slow pairs hardly turn within the text: the bias adds almost the same to all logits of a query,
    so that the model says what it said before.
    """
    model = llama(rope_theta=1e6)
    text, other = tokens(401)[0].tolist(), tokens(600, seed=3)[0].tolist()
    plain = Calibration((None,) * 3, "")
    unbiased, unbiased_plain = kl(model, text, calibrate(model, other)), kl(model, text, plain)
    assert unbiased_plain < 1.5 * unbiased  # there is no mean in random weights
    bias = mx.zeros((2, 64))
    bias[:, 29:32] = 100 * 4.6 / 3**0.5  # keys are about 4.6 long
    for layer in model.layers:
        layer.self_attn.k_proj.bias = bias.flatten()
    assert kl(model, text, calibrate(model, other)) < 2 * unbiased
    assert kl(model, text, None) < 2 * unbiased  # the bias itself is the centre
    assert kl(model, text, plain) > 5 * unbiased


@pytest.mark.parametrize("factor", [10, 0.1])
def test_a_first_token_unlike_all_others_does_no_harm(factor):
    centre = centres.random(2, 64)
    page = PageLayout(TQ4, 64)
    keys, values = centres.typical(centre, 40)
    positions = mx.arange(40)
    usual = codec.encode(keys, values, page, centre, positions)
    sink = factor * mx.random.normal((2, 64), key=mx.random.key(5)) * mx.linalg.norm(centre.mu) / 8
    keys[:, 0], values[:, 0] = sink, sink
    rows = codec.encode(keys, values, page, centre, positions)
    assert mx.array_equal(rows[:, 1:], usual[:, 1:])
    got_keys, got_values = (x[:, 0] for x in decoded(rows, page, centre, positions))
    for got, wanted in ((got_keys, sink * centre.smoothing), (got_values, sink)):
        error = mx.linalg.norm(got - rotate(wanted)) / mx.linalg.norm(wanted)
        assert error.item() < 0.13  # as of any vector at 4 bits: its own length is the measure
