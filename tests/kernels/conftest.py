"""Every kernel test runs on the simulator, and on a GPU where there is one."""

import mlx.core as mx
import pytest

from vllm_metal_tq import msl
from vllm_metal_tq.kernels.launch import on_gpu
from vllm_metal_tq.msl.simulate import simulate

_HAS = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
_NO_GPU = "no {} GPU: the kernels run for real on a machine with one"


def _gpu(name):
    reason = _NO_GPU.format({"metal": "Apple", "cuda": "NVIDIA"}[name])
    marks = [getattr(pytest.mark, name), pytest.mark.skipif(not _HAS[name], reason=reason)]
    return pytest.param(on_gpu, id=name, marks=marks)


_simulator = pytest.param(
    simulate,
    id="simulator",
    marks=pytest.mark.skipif(
        not msl.can_simulate() or any(_HAS.values()),
        reason="the simulator needs clang 19 or newer on Linux (pip install ziglang) and no GPU",
    ),
)


@pytest.fixture(params=[_simulator, _gpu("metal"), _gpu("cuda")])
def execute(request):
    return request.param
