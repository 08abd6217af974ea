"""What a long prompt takes at its peak; benchmarks/prefill_memory.py measures the demo model."""

import mlx.core as mx
import mlx_lm.models.cache as host
import pytest
from models import llama, tokens

from vllm_metal_tq import make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm import calibrate, report

LENGTH = 2048


def peak(model, cache, step):
    """Bytes above what was there before, the cache's own among them."""
    mx.clear_cache()
    before, prompt = mx.get_active_memory(), tokens(LENGTH)
    mx.reset_peak_memory()
    for start in range(0, LENGTH, step):
        model(prompt[:, start : start + step], cache=cache)
        mx.eval([layer.state for layer in cache])
    return mx.get_peak_memory() - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "step", "calibrated"), [(24, 128, False), (8, 64, False), (8, 128, True)]
)
def test_a_long_prompt_needs_the_cache_and_hardly_more_than_a_layer_besides(
    layers, step, calibrated
):
    model = llama(num_hidden_layers=layers)
    calibration = calibrate(model, tokens(300)[0].tolist()) if calibrated else None
    dense = host.make_prompt_cache(model)
    activations = peak(model, dense, step) - sum(layer.nbytes for layer in dense)
    layer = dense[0].nbytes
    del dense
    ours = make_prompt_cache(model, calibration=calibration)
    assert peak(model, ours, step) < report(ours).kv_bytes + 1.2 * layer + activations
