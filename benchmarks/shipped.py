"""The texts of the package, and the calibration that a model gets at first use."""

from importlib.resources import files

from vllm_metal_tq.calibration import Calibration
from vllm_metal_tq.config import CALIBRATION_TOKENS
from vllm_metal_tq.integrations.mlx_lm import calibrate


def text(name: str) -> str:
    return (files("vllm_metal_tq") / "data" / name).read_text(encoding="utf-8")


def calibration(model, tokenizer) -> Calibration:
    return calibrate(model, tokenizer.encode(text("calibration.txt"))[:CALIBRATION_TOKENS])
