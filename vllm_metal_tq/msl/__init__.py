"""Checks Metal kernels on a machine without Metal.

``generated_text`` gives the text that MLX would hand to Apple's compiler, ``check`` refuses what
that compiler would refuse, and ``run`` executes the text on simulated SIMD-groups. The last two
need clang (``find_clang``). ``docs/verification.md`` says what each of them can and cannot show.
"""

from vllm_metal_tq.msl.check import check
from vllm_metal_tq.msl.compiler import MetalError, can_simulate, find_clang
from vllm_metal_tq.msl.run import prebuild, run
from vllm_metal_tq.msl.text import generated_text

__all__ = ["MetalError", "can_simulate", "check", "find_clang", "generated_text", "prebuild", "run"]
