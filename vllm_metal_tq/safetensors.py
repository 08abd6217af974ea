"""Reading safetensors whole, with the types that ``mx.load`` leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx


def read(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of a file, evaluated, and its metadata.

    Raises:
        RuntimeError: the file is damaged or of another format.
    """
    loaded = mx.load(str(file), format="safetensors", return_metadata=True)
    arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
    mx.eval(arrays)  # reads the file to its end
    return arrays, metadata
