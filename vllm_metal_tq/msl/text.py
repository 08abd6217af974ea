"""The text MLX generates for a custom kernel, and what the other rungs read from it."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_metal_tq.msl.compiler import MetalError

if TYPE_CHECKING:
    import mlx.core as mx

_GENERATED = re.compile(r"Generated source code for `[^`]*`:\n```\n(.*?)\n```", re.S)
_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
_KERNEL = re.compile(r"(?:\[\[kernel\]\]|\bkernel\b)\s+void\s+(\w+)\s*\(")
_PARAMETER = re.compile(r"\s*(.*?)\s*(\w+)\s*\[\[([\w()]+)\]\]\s*", re.S)
_INSTANTIATION_ATTRIBUTES = re.compile(r"(?m)^(template) (?:\[\[[^\n]*?\]\] ?)+(?=decltype)")

# A declaration such as "threadgroup float s[64];", which must start its line.
THREADGROUP_VARIABLE = re.compile(
    r"(?m)^([ \t]*)(threadgroup\s+(?:const\s+)?[\w:]+(?:<[^;*&()]*>)?\s+\w+\s*"
    r"(?:\[[^;=]*\])*\s*(?:,[^;*&()]*)?;)"
)

_stdout_lock = threading.Lock()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: ``const device float* x [[buffer(0)]]``."""

    type: str
    name: str
    attribute: str

    @property
    def is_buffer(self) -> bool:
        """Whether a buffer is bound to it; otherwise it is one of the thread's positions."""
        return self.attribute.startswith("buffer")


@dataclass(frozen=True)
class Signature:
    """Name of a kernel, its template arguments (``<float, 4>`` or nothing) and parameters."""

    name: str
    template_arguments: str
    parameters: tuple[Parameter, ...]

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers, in order."""
        return [p.name for p in self.parameters if p.is_buffer]


def generated_text(call: Callable[..., Any], *arrays: mx.array) -> str:
    """The Metal text that MLX generates for one kernel call, without running it.

    The sizes of the arrays matter: MLX passes inputs of fewer than 8 elements as ``constant``
    references and larger ones as ``device`` pointers.

    Args:
        call: Function of the arrays that calls one ``mx.fast.metal_kernel`` kernel with
            ``verbose=True`` and returns its outputs.
        arrays: MLX arrays of the shapes and dtypes in question; their values are not read.

    Raises:
        MetalError: If not exactly one kernel was generated.
    """
    found: list[str] = _GENERATED.findall(_printed_by_export(call, arrays))
    if len(found) != 1:
        raise MetalError(f"expected one generated kernel, found {len(found)} (is verbose=True?)")
    return found[0]


def _printed_by_export(call: Callable[..., Any], arrays: tuple[mx.array, ...]) -> str:
    """What the C++ code of MLX prints while it exports the call."""
    import mlx.core as mx

    with _stdout_lock, tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(out.fileno(), 1)
        try:
            mx.export_function(os.path.join(folder, "call.mlxfn"), call, *arrays)
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
        out.seek(0)
        return out.read().decode()


def blank(match: re.Match[str]) -> str:
    """Spaces in place of the match, so that lines and columns stay where they are."""
    return re.sub(r"[^\n]", " ", match[0])


def without_comments(text: str) -> str:
    """The text with its comments and strings blanked; every line keeps its number."""
    return _COMMENT_OR_STRING.sub(blank, text)


def as_cpp(text: str) -> str:
    """The text with the two things changed that Metal's grammar has and C++ has not.

    Attributes of an explicit instantiation go, and threadgroup variables get a macro that
    ``stdlib.h`` defines for the purpose. Every line keeps its number.
    """
    text = _INSTANTIATION_ATTRIBUTES.sub(r"\1 ", text)
    return THREADGROUP_VARIABLE.sub(r"\1MSL_THREADGROUP_VAR \2", text)


def closing(text: str, start: int, pair: str) -> int:
    """Position behind the bracket that closes the one before ``start``; ``pair`` is "()"."""
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == pair[0]) - (text[position] == pair[1])
        if depth == 0:
            return position + 1
    raise MetalError(f"no closing {pair[1]}")


def kernel_bodies(text: str) -> list[tuple[int, int]]:
    """Start and end of the body of every kernel in a text without comments."""
    bodies = []
    for match in _KERNEL.finditer(text):
        start = text.find("{", closing(text, match.end(), "()")) + 1
        bodies.append((start, closing(text, start, "{}")))
    return bodies


def signature(text: str) -> Signature:
    """What the first kernel of the text is called and takes.

    Raises:
        MetalError: If there is no kernel or a parameter has no attribute.
    """
    plain = without_comments(text)
    match = _KERNEL.search(plain)
    if not match:
        raise MetalError("no kernel function")
    inside = plain[match.end() : closing(plain, match.end(), "()") - 1]
    # A comma inside <> or [] does not separate parameters.
    parameters = tuple(map(_parameter, re.split(r",(?![^<\[]*[>\]])", inside)))
    name = match[1]
    instance = re.search(rf"decltype\({name}(<.*?>)\) {name}", text)
    return Signature(name, instance[1] if instance else "", parameters)


def _parameter(text: str) -> Parameter:
    match = _PARAMETER.fullmatch(text)
    if not match:
        raise MetalError(f"kernel parameter without an attribute: {text.strip()}")
    return Parameter(match[1], match[2], match[3])
