import itertools
import math
import warnings

import mlx.core as mx
import pytest
from models import llama, tokens

from vllm_metal_tq import TurboQuantConfig, dispatch, make_prompt_cache, msl
from vllm_metal_tq.config import T2, T3
from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.kernels.launch import on_gpu
from vllm_metal_tq.kernels.selfcheck import Check
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.msl.compiler import why_not_simulate
from vllm_metal_tq.msl.simulate import simulate

needs_simulator = pytest.mark.skipif(not msl.can_simulate(), reason=str(why_not_simulate()))
LAYOUT = PageLayout(TurboQuantConfig(8, 6), 64)


@pytest.fixture
def checked():
    """Variants of decode that were checked, call by call."""
    return []


@pytest.fixture
def gpu(monkeypatch, checked):
    """Passes for a machine with a GPU, whose check gives what a test puts in."""
    found = []

    def check(layout, variants):
        checked.append(variants)
        return found

    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(dispatch, "check", check)
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


@pytest.mark.parametrize("widths", [(4, 4), (T3, T2)])
@pytest.mark.parametrize(
    ("head_dim", "served", "attends"),
    [(256, True, True), (257, True, False), (512, True, False), (513, False, False)],
)
def test_beyond_decode_the_other_kernels_serve(head_dim, served, attends, widths, gpu, checked):
    layout = PageLayout(TurboQuantConfig(*widths), head_dim)
    assert dispatch.executor(layout) is (on_gpu if served else None)
    assert [bool(variants) for variants in checked] == [attends] * served


@needs_simulator
def test_beyond_decode_attention_reads_gathered_pages(monkeypatch):
    model = llama(num_hidden_layers=1, head_dim=288)
    sequence, ends = tokens(46), [0, 44, 45, 46]

    def logits():
        cache = make_prompt_cache(model, TurboQuantConfig(T2, T3))
        chunks = itertools.pairwise(ends)
        return mx.concatenate([model(sequence[:, a:b], cache=cache) for a, b in chunks], axis=1)

    expected = logits()
    launched = []

    def execute(launch):
        launched.append(launch.kernel)
        return simulate(launch)

    monkeypatch.setattr(dispatch, "executor", lambda layout: execute)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    error = mx.abs(logits() - expected).max().item()
    assert error < 5e-3 * mx.abs(expected).max().item()
    assert launched == ["encode", "encode", "gather", "encode", "gather"]


@needs_simulator
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
