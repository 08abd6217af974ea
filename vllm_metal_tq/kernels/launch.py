"""What a kernel launch is: source, arguments, grid, and the executor that runs it.

The kernels are bodies in ``metal/*.metal``, written once for both GPUs: a dialect header each
gives Metal's words a meaning in CUDA and the other way round. A ``Launch`` is everything about
one call, so that tests can hand the same call to a simulator.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import mlx.core as mx
import numpy as np
from platformdirs import user_cache_path

_INSTALLED = Path(__file__).parents[1] / "metal"
SOURCES = _INSTALLED if _INSTALLED.exists() else Path(__file__).parents[2] / "metal"


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: the name of its file in ``metal/``, without the ending.
        inputs: its arrays by name, in the order of its parameters.
        template: its compile-time constants by name.
        outputs: shape and dtype of what it returns, by name.
        grid: threads in all.
        threadgroup: threads of a threadgroup.
    """

    kernel: str
    inputs: dict[str, mx.array]
    template: dict[str, int | mx.Dtype]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]

    def call(self, dialect: str, *inputs: mx.array, verbose: bool = False) -> list[mx.array]:
        """Run it on ``inputs`` in place of its own, through MLX's ``metal`` or ``cuda``."""
        kernel = _compiled(self.kernel, tuple(self.inputs), tuple(self.outputs), dialect)
        outputs: list[mx.array] = kernel(
            inputs=list(inputs),
            template=list(self.template.items()),
            output_shapes=[shape for shape, _ in self.outputs.values()],
            output_dtypes=[dtype for _, dtype in self.outputs.values()],
            grid=self.grid,
            threadgroup=self.threadgroup,
            verbose=verbose,
        )
        return outputs


Executor = Callable[[Launch], list[mx.array]]


def on_gpu(launch: Launch) -> list[mx.array]:
    """Run a launch on this machine's GPU."""
    return launch.call(dialect(), *launch.inputs.values())


def dialect() -> str:
    """The dialect of this machine's GPU, or of the simulator."""
    return "cuda" if mx.cuda.is_available() else "metal"


@lru_cache(maxsize=4096)
def integers(*values: int) -> mx.array:
    """A small int32 array, kept: making one anew at every call costs more than a launch."""
    return mx.array(values, mx.int32)


@lru_cache(maxsize=4096)
def numbers(*values: float) -> mx.array:
    """A small float32 array, kept."""
    return mx.array(values, mx.float32)


@lru_cache
def _compiled(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], dialect: str
) -> Callable[..., Any]:
    texts = {"header": header(name, dialect), "source": _source(f"{name}.metal", dialect)}
    build: Callable[..., Any] = mx.fast.metal_kernel
    if dialect == "cuda":
        build = mx.fast.cuda_kernel
        texts = {part: _by_reference(text) for part, text in texts.items()}
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    kernel: Callable[..., Any] = build(name=f"tq_{name}", **names, **texts)
    return kernel


def _by_reference(text: str) -> str:
    """An ``#include`` of a file in the user's cache that holds ``text``.

    For CUDA, MLX hashes the whole text at every launch: 2 us for 10 KB, as much as all else.
    Where the file cannot be written, the text itself.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = user_cache_path("vllm-metal-tq") / "cuda" / f"{digest}.h"
    try:
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=path.parent, delete=False) as whole:
                whole.write(text)
            Path(whole.name).replace(path)
    except OSError:
        return text
    return f'#include "{path}"\n'


@lru_cache
def header(kernel: str, dialect: str) -> str:
    """What comes before a kernel's body: the dialect, and the files that the body includes."""
    own = _source(f"dialect_{dialect}.h", "metal")
    return own + _hadamard_rows() + "".join(_source(name, dialect) for name in _included(kernel))


def _included(kernel: str) -> list[str]:
    """The files that a kernel includes, those first that others include in turn."""
    names = [f"{kernel}.metal"]
    for name in names:
        names += re.findall(r'^#include "(.*)"$', (SOURCES / name).read_text(), re.MULTILINE)
    return names[:0:-1]


@lru_cache
def _source(name: str, dialect: str) -> str:
    """A file as MLX gets it: without comments and indents, which would only cost time."""
    text = re.sub(r'//[^\n]*|^#include ".*"$', "", (SOURCES / name).read_text(), flags=re.MULTILINE)
    if dialect == "cuda":
        # CUDA's pointers name no address space, and a macro `device` would break `__device__`.
        text = re.sub(r"\b(?:device|constant|thread|threadgroup(?= \w+\*)) ", "", text)
        text = re.sub(r"\bthreadgroup ", "__shared__ ", text)
    return "\n".join(filter(None, map(str.strip, text.splitlines()))) + "\n"


def _hadamard_rows() -> str:
    """A C function: the signs of row ``row`` of MLX's Hadamard matrix of size ``m``, as bits."""
    text = ""
    for m in (12, 20, 28):
        # Row i of the transformed identity is column i of the matrix.
        negative = np.array(mx.hadamard_transform(mx.eye(m), stream=mx.cpu)).T < 0
        words = (negative << np.arange(m)).sum(axis=1)
        text += f"TQ_TABLE uint tq_hadamard_{m}[{m}] = {{{', '.join(map(hex, words))}}};\n"
    return text + (
        "TQ_FN uint tq_hadamard_row(int m, int row) {\n"
        "  return m == 12 ? tq_hadamard_12[row] : m == 20 ? tq_hadamard_20[row] "
        ": tq_hadamard_28[row];\n}\n"
    )
