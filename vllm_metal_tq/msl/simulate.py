"""An executor without a GPU: the Metal text that MLX generates, checked and simulated."""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from vllm_metal_tq import msl
from vllm_metal_tq.kernels.launch import Launch

_texts: dict[tuple[object, ...], str] = {}


def simulate(launch: Launch) -> list[mx.array]:
    """Run a launch on simulated SIMD-groups; its text must be valid Metal, without warnings.

    Raises:
        MetalError: the text is not valid, or the kernel misbehaved.
    """
    outputs = [(shape, _numpy_dtype(dtype)) for shape, dtype in launch.outputs.values()]
    inputs = [_to_numpy(x) for x in launch.inputs.values()]
    results = msl.run(metal_text(launch), inputs, outputs, launch.grid, launch.threadgroup)
    dtypes = [dtype for _, dtype in launch.outputs.values()]
    return [mx.array(x).view(dtype) for x, dtype in zip(results, dtypes, strict=True)]


def metal_text(launch: Launch) -> str:
    """What MLX would hand to Apple's compiler, checked once."""
    # MLX passes inputs of fewer than 8 elements in another address space.
    inputs = [(name, x.dtype, x.size < 8) for name, x in launch.inputs.items()]
    outputs = [(name, dtype) for name, (_, dtype) in launch.outputs.items()]
    key = (launch.kernel, *launch.template.items(), *inputs, *outputs)
    if key not in _texts:
        _texts[key] = msl.generated_text(
            lambda *arrays: launch.call("metal", *arrays, verbose=True), *launch.inputs.values()
        )
        _check(_texts[key])
    return _texts[key]


@lru_cache
def _check(text: str) -> None:
    for std in ("c++14", "c++17"):
        if faults := msl.check(text, std):
            raise msl.MetalError(f"not valid Metal ({std}): {'; '.join(map(str, faults))}")


def _numpy_dtype(dtype: mx.Dtype) -> type:
    """NumPy has no bfloat16: the simulator gets its bits."""
    return np.uint16 if dtype == mx.bfloat16 else np.array(mx.zeros(1, dtype)).dtype.type


def _to_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
