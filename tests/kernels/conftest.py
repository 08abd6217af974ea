"""Every kernel test runs on the simulator, and on a GPU where there is one."""

import mlx.core as mx
import pytest

from vllm_metal_tq.kernels.launch import on_gpu
from vllm_metal_tq.msl.compiler import why_not_simulate
from vllm_metal_tq.msl.simulate import simulate

_HAS = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
_NO_GPU = "no {} GPU: the kernels run for real on a machine with one"


def _gpu(name):
    reason = _NO_GPU.format({"metal": "Apple", "cuda": "NVIDIA"}[name])
    marks = [getattr(pytest.mark, name), pytest.mark.skipif(not _HAS[name], reason=reason)]
    return pytest.param(on_gpu, id=name, marks=marks)


_why_not = "a GPU runs the kernels here" if any(_HAS.values()) else why_not_simulate()
_simulator = pytest.param(
    simulate, id="simulator", marks=pytest.mark.skipif(_why_not is not None, reason=str(_why_not))
)


@pytest.fixture(params=[_simulator, _gpu("metal"), _gpu("cuda")])
def execute(request):
    return request.param
