"""Makes vllm-metal run on Linux, on MLX's CPU back-end; for tests only.

vLLM finds ``register`` as the platform plugin ``metal``, in every process it starts. What
vllm-metal asks of a Mac is answered here: that there is a GPU, how much memory it has, and the
native operations, which are plain MLX in ``ops``.
"""

import os

MEMORY_VARIABLE = "VLLM_METAL_ON_LINUX_MEMORY"


def register() -> str | None:
    """What vllm-metal's own entry point does, after the patches."""
    from vllm_metal_tq import openblas

    openblas.preload()
    os.environ.setdefault("VLLM_MLX_DEVICE", "cpu")
    _claim_memory(int(os.environ.get(MEMORY_VARIABLE, 2 << 30)))
    _replace_ops()

    import vllm_metal
    from vllm_metal.platform import MetalPlatform

    MetalPlatform.is_available = classmethod(lambda cls: True)
    MetalPlatform.import_kernels = classmethod(_import_kernels)
    return vllm_metal.register()


def _import_kernels(cls) -> None:
    """Load vLLM's library for this CPU; the default is the one for AVX-512."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.import_kernels()


def _claim_memory(size: int) -> None:
    """Let ``mx.device_info`` name the size that vllm-metal plans its memory from."""
    import mlx.core as mx

    real = getattr(mx.device_info, "real", mx.device_info)

    def device_info(*arguments):
        return real(*arguments) | {"max_recommended_working_set_size": size}

    device_info.real = real
    mx.device_info = device_info


def _replace_ops() -> None:
    """``get_ops()`` of vllm-metal answers with ours in place of the native extension."""
    import vllm_metal.metal

    from . import ops

    vllm_metal.metal._ops_module = ops
