"""Centring under each way of scaling and applying RoPE, with keys whose mean is most of them."""

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import numpy as np
import pytest
from kinds import DELTA_NET, HEADS, LLAMA3, MROPE, YARN
from models import build, tokens

from vllm_metal_tq import TurboQuantConfig, TurboQuantKVCache, make_prompt_cache, rope
from vllm_metal_tq.calibration import Calibration
from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.integrations.mlx_lm.measure import layer_ropes

CODES = TurboQuantConfig(k_width=3, v_width=8)  # errors are those of keys
WINDOWS = [*["sliding_attention"] * 2, "full_attention"]
TURNING = {  # pairs of a head's 32
    "plain": 32,
    "Llama 3": 32,
    "YaRN": 32,
    "M-RoPE": 32,
    "partial": 16,
    "partial M-RoPE": 8,
    "none": 0,
    "windows": 32,
}


def llama(**fields):
    return build("llama", **HEADS, attention_bias=True, **fields)


def model_of(name):
    """A model with this embedding, whose keys have a large bias before it."""
    model = {
        "plain": lambda: llama(),
        "Llama 3": lambda: llama(rope_scaling=LLAMA3, max_position_embeddings=8192),
        "YaRN": lambda: llama(rope_scaling=YARN),
        "M-RoPE": lambda: llama(rope_scaling=MROPE),
        "partial": lambda: build("glm4", **HEADS, partial_rotary_factor=0.5, attention_bias=True),
        "partial M-RoPE": lambda: build(
            "qwen3_5",
            **HEADS | DELTA_NET,
            num_hidden_layers=4,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=MROPE | {"partial_rotary_factor": 0.25},
        ),
        "none": lambda: build("smollm3", **HEADS, no_rope_layers=[0, 0, 0], attention_bias=True),
        "windows": lambda: llama(sliding_window=150, layer_types=WINDOWS),
    }[name]()
    for _, module in model.named_modules():
        if "k_proj" in module:
            shape = module.k_proj.bias.shape
            module.k_proj.bias = 3 * mx.random.normal(shape, key=mx.random.key(1))
    return model


@pytest.fixture(scope="module", params=TURNING)
def case(request):
    model = model_of(request.param)
    return request.param, model, calibrate(model, tokens(256)[0].tolist())


def logits(model, cache):
    """Of 9 tokens after 200, which see 180 and more through the pages."""
    ids = tokens(209, seed=1)
    model(ids[:, :200], cache=cache)
    return mx.concatenate([model(ids[:, i : i + 1], cache=cache) for i in range(200, 209)], axis=1)


def error(model, centres):
    exact = logits(model, host.make_prompt_cache(model))
    calibration = Calibration(tuple(centres), "")
    ours = logits(model, make_prompt_cache(model, CODES, calibration=calibration))
    return mx.linalg.norm(ours - exact).item()


def test_the_embedding_is_found_and_its_centres_are_used(case):
    name, model, calibration = case
    found = [x for x in layer_ropes(model) if x is not None]
    cache = make_prompt_cache(model, calibration=calibration)
    ours = [c for c in cache if isinstance(c, TurboQuantKVCache)]
    assert len(found) == len(ours) > 0
    for embedding, compressed in zip(found, ours, strict=True):
        centre = compressed.sequences.centre
        assert np.array_equal(centre.pairs, embedding.pairs)
        assert (centre.pairs[:, 2] > 0).sum() == TURNING[name]
    amplitude = 0.1 * math.log(4) + 1 if name == "YaRN" else 1.0
    assert found[0].amplitude[0] == pytest.approx(amplitude)


def test_centring_makes_the_error_smaller_and_turning_is_why(case):
    name, model, calibration = case
    still = nn.RoPE(64) if name == "none" else lambda x, offset: x
    wrong = rope.probe(still, 64).pairs
    right = error(model, calibration.centres)
    none = error(model, [None] * len(calibration.centres))
    turned = error(model, [c and replace(c, pairs=wrong) for c in calibration.centres])
    assert right < min(none, turned) / 2
