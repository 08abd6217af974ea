import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import rope_utils

from vllm_metal_tq import rope
from vllm_metal_tq.centre import TURN, Centre, phases, turn

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"scaling_factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = {
    "half-split": nn.RoPE(64, base=1e4),
    "traditional": nn.RoPE(64, traditional=True, base=1e4),
    "base 5e5": nn.RoPE(128, base=5e5),
    "base 1e6": nn.RoPE(128, base=1e6),
    "linear": nn.RoPE(64, base=1e4, scale=0.25),
    "llama 3": rope_utils.Llama3RoPE(64, base=5e5, scaling_config=LLAMA3),
    "yarn": rope_utils.YarnRoPE(128, base=1e6, **YARN),
    "su-scaled": rope_utils.SuScaledRoPE(64, long_factor=[1 + i / 8 for i in range(32)]),
    "dynamic": rope_utils.DynamicNTKScalingRoPE(64, 8192, False, 1e4, 4.0),
}
HEAD_DIM = {"base 5e5": 128, "base 1e6": 128, "yarn": 128}
POSITIONS = (0, 1, 77, 4096, 131071, 1_000_000)


def rates(name):
    """Radians per position in float64, from the frequencies that the class itself holds."""
    module = ROPES[name]
    if hasattr(module, "_freqs"):
        return 1 / np.array(module._freqs, np.float64)
    dims = module.dims
    scale = getattr(module, "scale", 1.0)
    return scale * float(module.base) ** (-np.arange(0, dims, 2) / dims)


def exact(x, position, rate, pairs, amplitude=1.0):
    angle = position * rate
    out = np.array(x, np.float64)
    a, b = out[..., pairs[0]].copy(), out[..., pairs[1]].copy()
    out[..., pairs[0]] = amplitude * (a * np.cos(angle) - b * np.sin(angle))
    out[..., pairs[1]] = amplitude * (b * np.cos(angle) + a * np.sin(angle))
    return out


def expected_pairs(name, dims):
    if name == "traditional":
        return np.arange(0, dims, 2), np.arange(1, dims, 2)
    return np.arange(dims // 2), np.arange(dims // 2, dims)


HELD = {name for name, module in ROPES.items() if hasattr(module, "_freqs")}


@pytest.mark.parametrize("name", ROPES)
def test_steps_are_those_of_the_class(name):
    dims = HEAD_DIM.get(name, 64)
    found = rope.probe(ROPES[name], dims)
    first, second = expected_pairs(name, dims)
    assert found.pairs[:, 0].tolist() == first.tolist()
    assert found.pairs[:, 1].tolist() == second.tolist()
    # A step is rounded by half of 2^-32 turn. nn.RoPE's frequencies are float32 powers of its
    # base, up to 1e-6 off; the others hold theirs, which float32 sines give to 4e-11 rad.
    rate = rates(name)
    error = np.abs(found.pairs[:, 2] / TURN * 2 * math.pi - rate)
    assert (error <= 0.51 * 2 * math.pi / TURN + (1.2e-7 if name in HELD else 1e-6) * rate).all()


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("position", POSITIONS)
def test_turning_is_the_embedding_at_every_position(name, position):
    dims = HEAD_DIM.get(name, 64)
    found = rope.probe(ROPES[name], dims)
    x = mx.random.normal((3, 1, dims), key=mx.random.key(1))
    turned = np.array(turn(x, mx.array([position]), found.pairs), np.float64)
    first, second = expected_pairs(name, dims)
    # Against float64 with the steps as they are: the integer arithmetic itself is exact.
    rate = found.pairs[:, 2] / TURN * 2 * math.pi
    assert np.abs(turned - exact(x, position, rate, (first, second))).max() < 3e-6
    # Against float64 with the class's frequencies: steps are off by 2^-33 turn, 7e-4 rad at
    # a million, and float32 frequencies by their own rounding.
    bound = position * (2 * math.pi / 2**33 + (1.2e-7 if name in HELD else 1e-6)) * 4 + 1e-5
    error = np.abs(turned - exact(x, position, rates(name), (first, second))).max()
    assert error < bound


@pytest.mark.parametrize("name", ROPES)
def test_turning_is_what_the_module_does(name):
    dims = HEAD_DIM.get(name, 64)
    found = rope.probe(ROPES[name], dims)
    x = mx.random.normal((1, 3, 40, dims), key=mx.random.key(1))
    for start in (0, 1000):
        positions = mx.arange(start, start + 40)
        turned = turn(x * mx.array(found.amplitude), positions, found.pairs)
        assert mx.abs(turned - ROPES[name](x, offset=start)).max().item() < 2e-3
        back = turn(turned, positions, found.pairs, inverse=True) / mx.array(found.amplitude)
        assert mx.abs(back - x).max().item() < 1e-5


def test_scaled_embeddings_have_an_amplitude():
    assert rope.probe(ROPES["yarn"], 128).amplitude == pytest.approx(0.1 * math.log(4) + 1)
    su = rope.probe(ROPES["su-scaled"], 64)
    assert su.amplitude == pytest.approx(ROPES["su-scaled"]._scale)
    assert su.amplitude[0] > 1.1
    assert rope.probe(ROPES["llama 3"], 64).amplitude == pytest.approx(1)


def test_elements_beyond_a_partial_embedding_stay():
    found = rope.probe(nn.RoPE(32, base=1e4), 96)
    assert sorted(found.pairs[:, :2].ravel().tolist()) == list(range(96))
    assert (found.pairs[:16, 2] > 0).all()
    assert (found.pairs[16:, 2] == 0).all()
    x = mx.random.normal((2, 1, 96))
    turned = turn(x, mx.array([1000]), found.pairs)
    assert mx.array_equal(turned[..., 32:], x[..., 32:])
    assert not mx.allclose(turned[..., :32], x[..., :32])


def test_an_embedding_that_changes_far_out_is_taken_as_it_is_near():
    dynamic = rope.probe(ROPES["dynamic"], 64)
    plain = rope.probe(nn.RoPE(64, base=1e4), 64)
    assert np.abs(dynamic.pairs.astype(float) - plain.pairs).max() <= 1  # of 2^32


def test_what_is_no_embedding_is_refused():
    with pytest.raises(ValueError, match="turns at position 0"):
        rope.probe(lambda x, offset: x[..., ::-1], 64)
    with pytest.raises(ValueError, match="in pairs"):
        rope.probe(lambda x, offset: x + (offset > 0) * mx.roll(x, 1, axis=-1), 64)


def test_a_model_without_an_embedding_does_not_turn():
    still = rope.constant(64)
    x = mx.random.normal((2, 3, 64))
    assert mx.array_equal(turn(x, mx.array([5, 77, 10**6]), still.pairs), x)


def test_phases_wrap_exactly():
    steps = np.array([1, 2**31 - 1, 683_565_276, 4_294_967_295], np.uint32)
    positions = np.array([0, 1, 131071, 1_000_000, 2**31 - 1])
    whole = positions[:, None] * steps.astype(object) % TURN
    signed = np.where(whole >= TURN // 2, whole - TURN, whole).astype(np.float64)
    got = np.array(phases(mx.array(positions), mx.array(steps)), np.float64)
    assert np.abs(got - signed / TURN * 2 * math.pi).max() < 4e-7


class TestCentre:
    @pytest.fixture
    def centre(self):
        mu, t, m = (mx.random.uniform(0.5, 2, (2, 64), key=mx.random.key(i)) for i in range(3))
        return Centre(rope.probe(ROPES["half-split"], 64).pairs, mu, t, m)

    def test_it_turns_the_mean(self, centre):
        at = centre.at(mx.array([0, 9]))
        assert at.shape == (2, 2, 64)
        assert mx.allclose(at[:, 0], centre.mu)
        expected = ROPES["half-split"](centre.mu[None, :, None], offset=9)[0, :, 0]
        assert mx.abs(at[:, 1] - expected).max().item() < 1e-5

    def test_without_mu_it_is_zero_everywhere(self, centre):
        assert (centre.without_mu.at(mx.array([3])) == 0).all()
        assert centre.without_mu.smoothing is centre.smoothing
