"""Finds clang, and gives it folders to work in that go when the process ends."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

OLDEST_CLANG = 19
INSTALL_HINT = "no clang 19 or newer: pip install ziglang, or apt-get install clang-19"
_NAMES = ("clang++-19", "clang++", *(f"clang++-{version}" for version in range(20, 30)))
_HERE = Path(__file__).resolve().parent

# Metal's headers; each one includes stdlib.h, which has everything.
_HEADERS = [
    *("metal_stdlib", "metal_common", "metal_compute", "metal_geometric", "metal_integer"),
    *("metal_math", "metal_matrix", "metal_numeric", "metal_relational", "metal_simdgroup"),
    *("metal_simdgroup_matrix", "metal_type_traits"),
]

# The target is fixed so that types have the same sizes everywhere. No header but those of
# the working folder can be found: no C or C++ library name may stand in for a Metal one.
_ALWAYS = [
    *("--target=x86_64-unknown-linux-gnu", "-x", "c++", "-nostdinc", "-nostdinc++", "-I."),
    *("-fno-color-diagnostics", "-Wno-unknown-attributes", "-Wno-unused-command-line-argument"),
    # As in Metal, 0.5 is a float.
    *("-Xclang", "-cl-single-precision-constant"),
]


class MetalError(Exception):
    """The kernel is not valid Metal, or it misbehaved when it ran."""


@functools.cache
def find_clang() -> list[str] | None:
    """The command that starts clang's C++ compiler, or None where there is none new enough.

    Looked for are ``clang++-19`` and other names on the PATH, then the package ``ziglang`` of
    this Python, whose program contains clang.
    """
    commands = [[path] for name in _NAMES if (path := shutil.which(name))]
    if zig := _zig():
        commands.append([zig, "clang", "--driver-mode=g++"])
    return next((command for command in commands if _version(command) >= OLDEST_CLANG), None)


def _zig() -> str | None:
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        return None
    return shutil.which("zig", path=os.path.dirname(package.origin))


def _version(command: list[str]) -> int:
    """Major version of clang; 0 for other compilers and Apple's, which counts differently."""
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"(?<!Apple )clang version (\d+)", answer)
    return int(match[1]) if match else 0


def clang() -> list[str]:
    """``find_clang()``, or MetalError where there is none."""
    found = find_clang()
    if found is None:
        raise MetalError(INSTALL_HINT)
    return found


def can_simulate() -> bool:
    """Whether this machine can run kernels without a GPU."""
    return why_not_simulate() is None


@functools.cache
def why_not_simulate() -> str | None:
    """What this machine lacks to run kernels without a GPU; None where it lacks nothing."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the simulator needs Linux on x86-64"
    if find_clang() is None:
        return INSTALL_HINT
    import mlx.core as mx

    try:
        mx.fast.metal_kernel(name="any", input_names=["x"], output_names=["y"], source="")
    except RuntimeError:
        return f"MLX {version('mlx')} generates no Metal text on this machine: 0.32 or newer does"
    return None


def linker() -> list[str]:
    """The command that makes a shared library of object files; zig has a linker of its own."""
    command = clang()
    if command[1:2] == ["clang"]:
        return [command[0], "ld.lld", "-shared", "-Bsymbolic"]
    return [*command, "-shared", "-nostdlib", "-Wl,-Bsymbolic"]


def compile_kernel(
    source: str, options: list[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Start clang on a source, with ``stdlib.h`` in front, in a folder of ``new_folder``."""
    (folder / "kernel.cpp").write_text(f'#include "stdlib.h"\n#line 1\n{source}')
    command = [*clang(), *_ALWAYS, *options, "kernel.cpp"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def new_folder() -> Path:
    """A new temporary folder with Metal's headers, which goes when the process ends."""
    folder = Path(tempfile.mkdtemp(dir=_root().name))
    for name in _HEADERS:
        (folder / name).write_text('#include "stdlib.h"\n')
    shutil.copyfile(_HERE / "stdlib.h", folder / "stdlib.h")
    return folder


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vllm-metal-tq-msl-")
