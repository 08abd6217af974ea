"""OpenBLAS for MLX's CPU back-end on Linux, whose wheel links a reference BLAS.

Loading OpenBLAS with global symbols before MLX makes MLX's calls resolve to it: about 30 times
faster in float32. Nothing of this applies to macOS, where MLX uses Accelerate, or to a GPU.
"""

from __future__ import annotations

import ctypes
import sys

_NAMES = ("libopenblas.so.0", "libopenblas.so")


def preload() -> str | None:
    """Load OpenBLAS into the process; call it before the first ``import mlx``.

    Returns:
        None where it is loaded or not needed, else one line that says why MLX will be slow.
    """
    if sys.platform != "linux":
        return None
    for name in _NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return None
    return (
        "slow: OpenBLAS is not installed, so MLX's CPU back-end uses its reference BLAS "
        "(Debian: apt-get install libopenblas0-pthread)"
    )
