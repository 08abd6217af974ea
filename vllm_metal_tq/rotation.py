"""The randomised Walsh-Hadamard rotation y = H (s * x) / sqrt(D).

It spreads a head vector's energy evenly, so that its coordinates are close to normally
distributed and one codebook fits all of them (TurboQuant, arXiv:2504.19874, section 3.1, with
the random rotation replaced by a fast one).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import mlx.core as mx
import numpy as np

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 1024
_HADAMARD_FACTORS = (1, 12, 20, 28)  # the m of the sizes m*2^k that MLX transforms
_SIGN_SEED = b"vllm-metal-tq signs 1"


def rotated_dim(head_dim: int) -> int:
    """The smallest multiple of 32 >= ``head_dim`` that can be rotated.

    Multiples of 32 let the 32 lanes of a GPU's SIMD-group share a vector evenly.

    Raises:
        ValueError: ``head_dim`` lies outside ``MIN_HEAD_DIM`` to ``MAX_HEAD_DIM``.
    """
    if not isinstance(head_dim, int) or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim {head_dim!r} cannot be rotated: "
            f"allowed are integers from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        )
    first = -(-head_dim // 32) * 32
    return next(size for size in range(first, 2 * first + 1, 32) if hadamard_factor(size))


def hadamard_factor(size: int) -> int:
    """The m of ``size = m * 2^k`` for which MLX has a Hadamard matrix, or 0."""
    factors = (m for m in _HADAMARD_FACTORS if size % m == 0)
    return next((m for m in factors if (size // m) & (size // m - 1) == 0), 0)


@lru_cache
def signs(dim: int) -> mx.array:
    """The random signs s: float32 of shape ``(dim,)``, +1 or -1, the same on every machine.

    They are the bits of SHA-256 in counter mode, so they depend on no library's generator.
    """
    digests = (hashlib.sha256(_SIGN_SEED + bytes([i])).digest() for i in range(-(-dim // 256)))
    bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8))[:dim]
    return mx.array(1.0 - 2.0 * bits.astype(np.float32))


@lru_cache
def _hadamard(dim: int) -> mx.array:
    # Row i of the transformed identity is H e_i, so this is the transpose of H.
    return mx.hadamard_transform(mx.eye(dim)).T


def rotate(x: mx.array) -> mx.array:
    """Rotate head vectors.

    Args:
        x: ``(..., head_dim)``, any float dtype.

    Returns:
        float32 ``(..., rotated_dim(head_dim))``; zeros fill up a head_dim that MLX cannot
        transform, so inner products are kept.
    """
    padding = rotated_dim(x.shape[-1]) - x.shape[-1]
    x = x.astype(mx.float32)
    if padding:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return mx.hadamard_transform(x * signs(x.shape[-1]))


def unrotate(y: mx.array, head_dim: int) -> mx.array:
    """Undo ``rotate``.

    Args:
        y: ``(..., rotated_dim(head_dim))``, any float dtype.
        head_dim: the size before rotation.

    Returns:
        float32 ``(..., head_dim)``.
    """
    y, dim = y.astype(mx.float32), y.shape[-1]
    # Hadamard matrices of sizes 20*2^k and 28*2^k are not symmetric: the inverse is the
    # transpose, which hadamard_transform does not offer. As row vectors, H^T y is y @ H.
    symmetric = dim % 5 and dim % 7
    x = mx.hadamard_transform(y) if symmetric else y @ _hadamard(dim)
    return (x * signs(dim))[..., :head_dim]
