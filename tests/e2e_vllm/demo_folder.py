"""The demo model in the form that vLLM reads: Hugging Face names, float32, tokenizer."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from vllm_metal_tq import demo_model


def write(target: Path) -> Path:
    """Write it to ``target``; mlx_lm's names for a llama are Hugging Face's."""
    target.mkdir(parents=True)
    source = demo_model.folder()
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
    for file in source.glob("chat_template*"):
        shutil.copy(file, target)
    config = json.loads((source / "config.json").read_text())
    del config["quantization"]
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))
    model, _ = demo_model.load()
    weights = {name: w.astype(mx.float32) for name, w in tree_flatten(model.parameters())}
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    return target


def write_config_only(target: Path, config: dict) -> Path:
    """A folder with the demo model's tokenizer and another model's config, without weights."""
    target.mkdir(parents=True)
    for file in demo_model.folder().glob("tokenizer*"):
        shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(config))
    return target
