"""An executor without a GPU, from the package."""

from vllm_metal_tq.msl.simulate import metal_text, simulate

__all__ = ["metal_text", "simulate"]
