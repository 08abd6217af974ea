"""What is different in tests where kernels serve."""

import mlx.core as mx
import pytest

KERNELS = mx.default_device() == mx.gpu

where_the_host_looks = pytest.mark.skipif(
    KERNELS,
    reason="on a GPU the host does not wait to find what cannot be encoded: docs/reliability.md",
)


def bound(reference: float, kernels: float) -> float:
    """How far apart two ways to the same numbers may be: on a GPU one of them goes by kernels."""
    return kernels if KERNELS else reference
