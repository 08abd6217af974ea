import itertools
import math
import warnings

import mlx.core as mx
import pytest
from models import llama, tokens

from vllm_metal_tq import TurboQuantConfig, dispatch, make_prompt_cache, msl
from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.kernels.launch import on_gpu
from vllm_metal_tq.kernels.selfcheck import Check
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.msl.compiler import why_not_simulate
from vllm_metal_tq.msl.simulate import simulate

LAYOUT = PageLayout(TurboQuantConfig(8, 6), 64)


@pytest.fixture
def gpu(monkeypatch):
    """Passes for a machine with a GPU, whose check gives what a test puts in."""
    found = []
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(dispatch, "check", lambda layout, variants: found)
    dispatch.executor.cache_clear()
    yield found
    dispatch.executor.cache_clear()


def test_kernels_that_pass_their_check_serve(gpu):
    gpu.append(Check("decode", "mma", True, 1e-4))
    assert dispatch.executor(LAYOUT) is on_gpu


@pytest.mark.parametrize("message", ["", "no such function: tq_pair"])
def test_where_a_kernel_fails_the_reference_serves_with_one_warning(gpu, message):
    gpu.append(Check("decode", "mma", False, None, message))
    with pytest.warns(UserWarning, match=r"decode .*doctor --json") as caught:
        assert dispatch.executor(LAYOUT) is None
    assert len(caught) == 1
    assert (message or "wrong result") in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.executor(LAYOUT) is None


def test_a_head_dim_beyond_the_kernels_is_left_to_the_reference(gpu):
    assert dispatch.executor(PageLayout(TurboQuantConfig(4, 4), 512)) is None


@pytest.mark.skipif(not msl.can_simulate(), reason=str(why_not_simulate()))
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_says_the_same_through_kernels_and_through_the_reference(calibrated, monkeypatch):
    model = llama(num_hidden_layers=1)
    sequence, ends = tokens(96), [0, 60, 61, 62, 65, 80, 81]
    # The keys of a first layer have no mean.
    monkeypatch.setattr("vllm_metal_tq.calibration.WORTH", -math.inf)
    calibration = calibrate(model, tokens(100, seed=1)[0].tolist()) if calibrated else None

    def logits():
        cache = make_prompt_cache(model, TurboQuantConfig(8, 6), calibration=calibration)
        chunks = itertools.pairwise(ends)
        return mx.concatenate([model(sequence[:, a:b], cache=cache) for a, b in chunks], axis=1)

    expected = logits()
    launched = []
    monkeypatch.setattr(dispatch, "executor", lambda layout: execute)
    monkeypatch.setattr(mx, "compile", lambda function: function)

    def execute(launch):
        launched.append((launch.kernel, launch.template.get("CENTRE", 0)))
        return simulate(launch)

    error = mx.abs(logits() - expected).max().item()
    assert error < 5e-3 * mx.abs(expected).max().item()
    centred = {(kernel, calibrated) for kernel in ("encode", "decode_fma", "merge")}
    assert centred | {("gather", 0)} <= set(launched)
