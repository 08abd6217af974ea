"""Kernels with something planted in them, and the marks of tests that need clang."""

import pytest

from vllm_metal_tq import msl
from vllm_metal_tq.msl.compiler import INSTALL_HINT, why_not_simulate

needs_clang = pytest.mark.skipif(msl.find_clang() is None, reason=INSTALL_HINT)
needs_simulator = pytest.mark.skipif(not msl.can_simulate(), reason=str(why_not_simulate()))

_KERNEL = """#include <metal_stdlib>
using namespace metal;
%s
[[kernel]] void k(const device float* x [[buffer(0)]], const constant int* n [[buffer(1)]],
  device float* y [[buffer(2)]], uint t [[thread_index_in_threadgroup]],
  uint lane [[thread_index_in_simdgroup]], uint3 g [[threadgroup_position_in_grid]]) {
  threadgroup float s[64];
%s
}
"""


def kernel(body: str, before: str = "") -> str:
    """A kernel of 64 threads; ``before`` stands on line 3, ``body`` on line 8."""
    return _KERNEL % (before, body)


CLEAN = kernel(
    "s[t] = x[t]; threadgroup_barrier(mem_flags::mem_threadgroup);"
    "y[t] = simd_sum(s[63 - t]) + fast::exp2(0.5) + float2(1, n[0]).y;"
)
