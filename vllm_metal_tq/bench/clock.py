"""How time and memory are measured: warm-up, the median of many, and what one call costs."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

import mlx.core as mx

from .. import __version__

WARM_UP, REPEATS = 3, 15
STREAMED = 1 + WARM_UP + REPEATS  # items of a stream that ``stream_times`` takes


def gpu_backend() -> str | None:
    """``metal`` or ``cuda`` where MLX runs on a GPU, else None."""
    if mx.default_device().type != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def runs() -> str:
    """``kernels``, or ``reference`` where plain MLX operations take their place."""
    return "kernels" if gpu_backend() else "reference"


def machine() -> dict[str, str]:
    """The name of the device that MLX runs on, and MLX's version."""
    name = mx.device_info().get("device_name", "unknown")
    return {"device": f"{name} ({gpu_backend() or 'CPU'})", "mlx": metadata.version("mlx")}


def software() -> dict[str, str]:
    """The system, and the versions of what runs on it."""
    macos = platform.mac_ver()[0]
    system = f"macOS {macos}" if macos else platform.system()
    return {
        "system": f"{system} {platform.machine()}",
        "vllm_metal_tq": __version__,
        "mlx": metadata.version("mlx"),
        "mlx_lm": metadata.version("mlx-lm"),
    }


def device_bytes() -> int:
    """The device's memory, or the machine's where MLX does not say."""
    info = mx.device_info()
    size = info.get("memory_size") or info.get("total_memory")
    return int(size or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_room(num_bytes: int, what: str) -> None:
    """Raise a ValueError where the device's memory is smaller than what is asked for."""
    if num_bytes > (there := device_bytes()):
        raise ValueError(
            f"{what} takes {num_bytes // 10**9} GB, the device has {there // 10**9} GB of memory"
        )


def wall(call: Callable[[], object]) -> float:
    """Seconds until what ``call()`` returns is evaluated, median of ``REPEATS``."""
    for _ in range(WARM_UP):
        mx.eval(call())
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def stream_times(stream: Iterable[object]) -> tuple[float, float]:
    """Seconds until the first item comes, and between later ones: their median after a warm-up.

    Args:
        stream: yields ``STREAMED`` items, each when it is evaluated, and has done all of its work
            when it ends.
    """
    marks = [time.perf_counter()]
    marks += [time.perf_counter() for _ in stream]
    if len(marks) != 1 + STREAMED:
        raise ValueError(f"the stream has {len(marks) - 1} items, not {STREAMED}")
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return seconds[0], statistics.median(seconds[1 + WARM_UP :])


def kernel_time(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Seconds of one ``call(x)`` where the host costs nothing.

    All inputs are evaluated in one graph. They must differ, or equal calls would become one; on
    a GPU the graph is compiled, so that the host only enqueues it.
    """

    def batch(xs: list[Any]) -> list[Any]:
        return [call(x) for x in xs]

    run = mx.compile(batch) if gpu_backend() else batch
    mx.eval(inputs)
    return wall(lambda: run(list(inputs))) / len(inputs)


def chain_time(call: Callable[[mx.array], mx.array], x: mx.array, length: int) -> float:
    """Seconds of one call in a chain of ``length``, each fed what the one before returned.

    On a GPU the chain is compiled, as in ``kernel_time``. Calls cannot overlap here.
    """

    def chain(y: mx.array) -> mx.array:
        for _ in range(length):
            y = call(y)
        return y

    run = mx.compile(chain) if gpu_backend() else chain
    return wall(lambda: run(x)) / length


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of an element-wise operation on large arrays.

    Up to 1 GiB each on a GPU, an eighth of its memory in all: smaller ones show less bandwidth.
    """
    size = min(1 << 30, device_bytes() // 64) if gpu_backend() else 32 << 20
    inputs = [mx.full((size // 4,), float(i), mx.float32) for i in range(4)]
    return 2 * size / kernel_time(mx.abs, inputs)


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes that the device's memory peaks at above its use before ``call()``."""
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(call())
    return max(mx.get_peak_memory() - before, 0)  # the peak counts allocations alone


def release() -> None:
    """Give MLX's cached buffers back, between cases."""
    mx.synchronize()
    mx.clear_cache()
