"""What a Mac offers: memory that a process may use, and its bandwidth."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

GIB = 1 << 30

CHIPS = {
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": 614,
}
"""Memory bandwidth in GB/s: Apple's technical specifications, of each chip's largest version."""

THREE_QUARTERS_FROM = 36 * GIB


@dataclass(frozen=True)
class Machine:
    """A Mac's memory.

    Attributes:
        memory_bytes: all of it.
        working_set_bytes: what macOS recommends that a process uses of it on the GPU.
        measured: whether this machine has said so; else it is estimated from its memory.
    """

    memory_bytes: int
    working_set_bytes: int
    measured: bool = False


def bandwidth(chip: str) -> float:
    """Bytes per second of a chip's memory.

    Raises:
        ValueError: its name is not known.
    """
    known = {name.lower().replace(" ", ""): name for name in CHIPS}
    name = known.get(re.sub(r"[\s_-]|apple", "", chip.lower()))
    if name is None:
        raise ValueError(f"--chip {chip!r} is unknown: allowed are {', '.join(CHIPS)}")
    return CHIPS[name] * 1e9


def memory_size(text: str) -> int:
    """Bytes of a size such as ``8GB``, in units of 1024, in which memory is sold.

    Raises:
        ValueError: it is no such size, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])i?B?\s*", text, re.IGNORECASE)
    size = float(found[1]) * 1024 ** (2 + "MGT".index(found[2].upper())) if found else 0
    if not 1 <= size < math.inf:
        raise ValueError(f"--memory {text!r} is no size: expected such as 8GB or 512MB")
    return int(size)


def estimated(memory_bytes: int) -> Machine:
    """A Mac with so much memory.

    The least that Metal's ``recommendedMaxWorkingSetSize`` was on any macOS for others, 2/3 of up
    to 32 GB and 3/4 of 36 GB and more: docs/planner.md has the readings and their sources.
    """
    part, whole = (3, 4) if memory_bytes >= THREE_QUARTERS_FROM else (2, 3)
    return Machine(memory_bytes, memory_bytes * part // whole)


def this_mac() -> Machine | None:
    """The Mac that runs this, as MLX describes it; None where there is no Metal."""
    import mlx.core as mx

    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size")
    if limit is None:
        return None
    return Machine(int(info["memory_size"]), int(limit), measured=True)


def mac(memory: str | None) -> Machine | None:
    """A Mac with so much memory, by what macOS says where it is the one that runs this.

    Args:
        memory: a size such as ``8GB``; None: of the Mac that runs this.

    Returns:
        None where ``memory`` is None and no Mac runs this.

    Raises:
        ValueError: ``memory`` is no size.
    """
    here = this_mac()
    if memory is None:
        return here
    wanted = memory_size(memory)
    return here if here and here.memory_bytes == wanted else estimated(wanted)
