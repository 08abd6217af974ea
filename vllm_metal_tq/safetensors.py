"""Safetensors that may say anything, read whole; and written so that they are never half there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .atomic import replacing

_MOST = (1 << 31) - 1  # of a dimension in MLX


def read(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of a file, evaluated, and its metadata.

    The header is checked by the format's own library first, against the size of the file: MLX
    takes dimensions below zero, and of those beyond 32 bits the lower half.

    Raises:
        ValueError: the header is wrong, or says more than the file holds.
        RuntimeError: MLX cannot read it.
    """
    _check(file)
    loaded = mx.load(str(file), format="safetensors", return_metadata=True)
    arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
    mx.eval(arrays)  # reads the file to its end
    return arrays, metadata


def write(
    file: Path,
    what: str,
    arrays: dict[str, mx.array],
    metadata: dict[str, str],
    finish: Callable[[BinaryIO], None] = lambda stream: None,
) -> None:
    """Write a file; what it replaces stays whole until the new one is complete.

    Args:
        file: where to.
        what: is written, for an error.
        arrays: by name.
        metadata: strings to keep with them.
        finish: called with the whole file, before it takes its place.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = arrays or {"none": mx.zeros(1)}  # safetensors cannot be empty
    with replacing(file, what, sum(array.nbytes for array in arrays.values())) as stream:
        mx.save_safetensors(stream, arrays, metadata)
        finish(stream)


def _check(file: Path) -> None:
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                shape = opened.get_slice(name).get_shape()
                if any(size > _MOST for size in shape):
                    raise ValueError(f"array {name!r} has shape {tuple(shape)}")
    except SafetensorError as error:
        raise ValueError(f"no safetensors: {error}") from error
