"""Runs before any test imports mlx, so that OpenBLAS can be loaded first."""

import os
import sys

# Where a GPU multiplies float32 as TF32 by default, bounds of float32 would not hold.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from vllm_metal_tq import openblas

if complaint := openblas.preload():
    print(complaint, file=sys.stderr)

import pytest


@pytest.fixture(scope="session")
def demo():
    """SmolLM2-135M-Instruct: ``(model, tokenizer)``."""
    from vllm_metal_tq import demo_model

    return demo_model.load()
