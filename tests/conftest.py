"""Runs before any test imports mlx, so that OpenBLAS can be loaded first."""

import sys

from vllm_metal_tq import openblas

if complaint := openblas.preload():
    print(complaint, file=sys.stderr)

import pytest


@pytest.fixture(scope="session")
def demo():
    """SmolLM2-135M-Instruct: ``(model, tokenizer)``."""
    from vllm_metal_tq import demo_model

    return demo_model.load()
