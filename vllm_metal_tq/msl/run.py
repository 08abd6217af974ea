"""Runs a kernel on simulated SIMD-groups and finds what a GPU would silently get wrong."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vllm_metal_tq.msl import compiler
from vllm_metal_tq.msl.compiler import MetalError
from vllm_metal_tq.msl.text import Parameter, Signature, as_cpp, signature

# The rows of msl_ids in simulator.cpp, in their order there.
_POSITIONS = [
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "thread_index_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_threadgroup",
    "threads_per_grid",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "dispatch_threads_per_threadgroup",
]
_SIMULATOR = Path(__file__).resolve().parent / "simulator.cpp"

_OPTIONS = [
    *("-std=c++17", "-DMSL_SIM", "-O1", "-gdwarf-4", "-g1", "-fPIC", "-w", "-ffreestanding"),
    *("-fno-exceptions", "-fno-rtti", "-fwrapv", "-fno-strict-aliasing"),
    # Without the kernels' unrolled loops clang takes half as long, and the results are the same.
    "-D_Pragma(x)=",
    # Round half after every operation.
    *("-Xclang", "-ffloat16-excess-precision=none"),
    # Only the calls that clang inserts: simulator.cpp has the functions they call.
    *("-fsanitize=thread,array-bounds", "-ftrivial-auto-var-init=pattern"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1", "-c", "-o", "kernel.o"),
]


def run(
    text: str,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[Sequence[int], type]],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    strict: bool = True,
    stats: dict[str, int] | None = None,
    fast_math: bool = False,
) -> list[np.ndarray]:
    """Run a kernel and find its faults.

    Found are accesses out of bounds or misaligned, reads of memory that nothing has written,
    missing barriers, SIMD-group operations that not all lanes reach, and output bytes that no
    thread or (with ``strict``) more than one thread writes.

    Args:
        text: A whole Metal text, such as ``generated_text`` returns.
        inputs: The arrays of the input buffers in order, without those that MLX adds itself
            (``x_shape``, ``x_strides``, ``x_ndim`` behind an input ``x``).
        outputs: Shape and NumPy dtype of every output.
        grid: Threads in x, y and z, as MLX takes it; edges need not be whole threadgroups.
        threadgroup: Threads of a threadgroup in x, y and z.
        strict: Whether no output byte may be used by two threads.
        stats: Filled with ``switches`` (of threads), ``threadgroup_bytes`` and ``threads``.
        fast_math: Whether to compile with ``-ffast-math``, as MLX lets Apple's compiler do.

    Returns:
        The outputs.

    Raises:
        MetalError: The first fault found, with its line where known; or what kept the kernel
            from being built or run.
    """
    kernel = _kernel(text, fast_math)
    names = kernel.signature.buffers
    arrays = _bound(names, list(inputs), len(outputs))
    buffers = [_Buffer(name, array) for name, array in zip(names, arrays, strict=False)]
    for name, (shape, dtype) in zip(names[len(arrays) :], outputs, strict=True):
        buffers.append(_Buffer(name, np.empty(shape, dtype), output=True))
    kernel.start(buffers, grid, threadgroup, strict, stats)
    return [buffer.result() for buffer in buffers[len(arrays) :]]


def prebuild(texts: Iterable[str], fast_math: bool = False, workers: int | None = None) -> None:
    """Compile several kernels at once, so that ``run`` finds them ready.

    Args:
        texts: The texts that will be given to ``run``.
        fast_math: As for ``run``.
        workers: Compilers running at a time; by default as many as there are processors.

    Raises:
        MetalError: If one of them cannot be built.
    """
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(lambda text: _kernel(text, fast_math), dict.fromkeys(texts)))


# ---- The compiled kernel


class _BufferRecord(ctypes.Structure):
    """msl_buffer of simulator.cpp."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("owner", ctypes.c_void_p),
        ("writable", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


@dataclass
class _Kernel:
    """A kernel and its own copy of the simulator, which runs one dispatch at a time."""

    signature: Signature
    path: Path
    library: ctypes.CDLL
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(
        self,
        buffers: Sequence[_Buffer],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        strict: bool,
        stats: dict[str, int] | None,
    ) -> None:
        table = (_BufferRecord * len(buffers))(*(buffer.record() for buffer in buffers))
        message, counts = ctypes.create_string_buffer(2048), (ctypes.c_uint64 * 2)()
        three = ctypes.c_uint32 * 3
        with self.lock:
            failed = self.library.msl_run(
                *(table, len(buffers), three(*grid), three(*threadgroup)),
                *(int(strict), message, counts),
            )
        if stats is not None:
            stats.update(switches=counts[0], threadgroup_bytes=counts[1])
            stats.update(threads=int(np.prod(grid)))
        if failed:
            raise MetalError(_with_line(message.value.decode(), self.path))


_kernels: dict[tuple[str, bool], _Kernel] = {}


def _kernel(text: str, fast_math: bool) -> _Kernel:
    """The compiled kernel, kept for the process."""
    key = (text, fast_math)
    if key not in _kernels:
        # Two threads may build the same kernel; the first one to finish counts.
        _kernels.setdefault(key, _build(text, fast_math))
    return _kernels[key]


def _build(text: str, fast_math: bool) -> _Kernel:
    described = signature(text)
    folder = compiler.new_folder()
    if fast_math:
        options = ["-ffast-math", "-ffp-contract=fast", *_processor_options()]
    else:
        options = ["-ffp-contract=off", *_processor_options()]
    source = as_cpp(text) + _entry(described)
    result = compiler.compile_kernel(source, [*_OPTIONS, *options], folder)
    if result.returncode:
        raise MetalError(result.stderr)
    library = folder / "kernel.so"
    _call([*compiler.linker(), "kernel.o", str(_simulator()), "-o", library.name], folder)
    return _Kernel(described, library, ctypes.CDLL(str(library)))


def _call(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise MetalError(result.stderr)


@functools.cache
def _processor_options() -> list[str]:
    """Let clang use the instructions that fma() and half need, where the processor has them."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return [f"-m{name}" for name in ("fma", "f16c") if name in flags]


_simulator_lock = threading.Lock()


def _simulator() -> Path:
    """Object file of simulator.cpp."""
    with _simulator_lock:
        return _built_simulator()


@functools.cache
def _built_simulator() -> Path:
    if not compiler.can_simulate():
        raise MetalError("the simulator needs Linux on x86-64")
    folder = compiler.new_folder()
    options = ["--target=x86_64-unknown-linux-gnu", "-std=c++17", "-O2", "-fPIC", "-nostdinc"]
    _call([*compiler.clang(), *options, "-c", str(_SIMULATOR), "-o", "simulator.o"], folder)
    return folder / "simulator.o"


def _entry(kernel: Signature) -> str:
    """C++ that the simulator calls for every thread, and that calls the kernel."""
    arguments, buffers = [], 0
    for parameter in kernel.parameters:
        if parameter.is_buffer:
            arguments.append(_buffer_argument(parameter.type, buffers))
            buffers += 1
        else:
            arguments.append(_position_argument(parameter))
    call = f"{kernel.name}{kernel.template_arguments}({', '.join(arguments)})"
    return (
        '\n#line 1 "entry"\n'
        "struct msl_buffer { char* base; ulong size; void* owner; int writable; const char* n; };\n"
        f"struct msl_ids {{ uint v[{len(_POSITIONS)}][3]; }};\n"
        'extern "C" __attribute__((no_sanitize("thread")))\n'
        f"void msl_entry(msl_buffer* b, const msl_ids* ids) {{ {call}; }}\n"
    )


def _buffer_argument(kind: str, number: int) -> str:
    if "&" in kind:
        return f"*({kind.replace('&', '*')})b[{number}].base"
    return f"({kind})b[{number}].base"


def _position_argument(parameter: Parameter) -> str:
    if parameter.attribute not in _POSITIONS:
        raise MetalError(f"unknown attribute [[{parameter.attribute}]]")
    row = f"ids->v[{_POSITIONS.index(parameter.attribute)}]"
    width = int(parameter.type[-1]) if parameter.type[-1] in "23" else 1
    return f"{parameter.type}({', '.join(f'{row}[{k}]' for k in range(width))})"


# ---- Memory


class _Buffer:
    """A buffer with slack around it, 256-byte aligned as MLX's buffers are."""

    SLACK = 4096

    def __init__(self, name: str, array: np.ndarray, output: bool = False):
        self.name, self.shape, self.dtype = name, array.shape, array.dtype
        room = np.full(array.nbytes + 3 * self.SLACK, 0xFF, np.uint8)
        start = self.SLACK + -(room.ctypes.data + self.SLACK) % 256
        self.bytes = room[start : start + array.nbytes]
        # For every byte of an output the number of the thread that wrote it.
        self.owner = np.zeros(array.nbytes, np.uint32) if output else None
        if not output:
            self.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def record(self) -> _BufferRecord:
        owner = None if self.owner is None else self.owner.ctypes.data
        address, size, name = self.bytes.ctypes.data, self.bytes.size, self.name.encode()
        return _BufferRecord(address, size, owner, self.owner is not None, name)

    def result(self) -> np.ndarray:
        missing = np.flatnonzero(self.owner == 0)
        if missing.size:
            raise MetalError(
                f"output {self.name}: {missing.size} of {self.bytes.size} bytes never written, "
                f"first at byte {missing[0]}"
            )
        return self.bytes.copy().view(self.dtype).reshape(self.shape)


def _bound(names: list[str], inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The array of every input buffer: those given, and those that MLX adds behind them."""
    given, bound, last = iter(inputs), [], None
    for name in names[: len(names) - outputs]:
        added = re.fullmatch(r"(\w+)_(shape|strides|ndim)", name)
        if added and last is not None and added[1] == last[0]:
            bound.append(_description(last[1], added[2]))
            continue
        array = next(given, None)
        if array is None:
            raise MetalError(f"no input for buffer {name}")
        last = name, np.ascontiguousarray(array)
        bound.append(last[1])
    if next(given, None) is not None:
        raise MetalError("more inputs than buffers")
    return bound


def _description(array: np.ndarray, what: str) -> np.ndarray:
    if what == "shape":
        return np.array(array.shape, np.int32)
    if what == "strides":
        return np.array(array.strides, np.int64) // array.itemsize
    return np.array([array.ndim], np.int32)


# ---- Messages


def _with_line(message: str, library: Path) -> str:
    """The message with the kernel's line in place of the address that the simulator gives."""
    match = re.search(r" @0x([0-9a-f]+)$", message)
    if not match:
        return message
    # The address is that of the instruction behind the call; one byte before is inside it.
    lines = _lines(library, int(match[1], 16) - _loaded_at(library) - 1)
    where = " line " + " from line ".join(lines) if lines else ""
    return message[: match.start()] + where


def _loaded_at(library: Path) -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return next(int(row.split("-")[0], 16) for row in maps if row.endswith(str(library)))


def _lines(library: Path, address: int) -> list[str]:
    """Line of the instruction and of the calls that were inlined around it."""
    tool = shutil.which("llvm-symbolizer-19") or shutil.which("addr2line")
    if tool is None:
        return []
    command = [tool, "-i", "-e", str(library), hex(address)]
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    return re.findall(r"kernel\.cpp:(\d+)", answer)
