"""Safetensors, read whole and written so that they are never half there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import mlx.core as mx

from .atomic import replacing


def read(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of a file, evaluated, and its metadata.

    Raises:
        RuntimeError: the file is damaged or of another format.
    """
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
