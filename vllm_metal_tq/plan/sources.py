"""Where the planner finds a model's configuration: shipped, in a folder or file, or on a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """Name -> ``ids`` on Hugging Face, ``config`` and its ``source``: see data/models.json."""
    found: dict[str, dict[str, Any]] = json.loads(
        (files("vllm_metal_tq") / "data" / "models.json").read_text("utf-8")
    )
    return found


def find(name: str) -> tuple[Mapping[str, Any], int | None]:
    """The ``config.json`` of a model, and the bytes of its weights where its files are here.

    Args:
        name: a folder, a file, a shipped name, or a Hugging Face id. Only the last needs a
            network, and only ``config.json`` is fetched.

    Raises:
        ValueError: it is none of these, cannot be fetched, or holds no JSON object.
    """
    path = Path(name)
    if path.is_dir():
        return _parsed(name, path / "config.json"), _weight_bytes(path)
    if path.is_file():
        return _parsed(name, path), None
    for known, entry in shipped().items():
        if name.lower() in (known, *(each.lower() for each in entry["ids"])):
            return entry["config"], None
    return _parsed(name, _downloaded(name)), None


def _parsed(name: str, file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ValueError(f"model {name!r}: there is no {file.name} in that folder")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8; of JSON too deep
        raise ValueError(f"model {name!r}: {file.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model {name!r}: {file.name} holds no JSON object")
    return config


def _weight_bytes(folder: Path) -> int | None:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors")) or None


def _downloaded(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # bad names, the network and the hub share no base class
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(
            f"model {name!r} is no file, no folder and not shipped ({', '.join(shipped())}), and "
            f"its config.json cannot be fetched: {reason}"
        ) from error
