"""Files that are whole at any moment: the old one or the new one, however the writing ends.

The new one is written beside the old one, brought onto the disk, and only then takes its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

SUFFIX = ".unfinished"
_YOUNG = 60.0  # seconds in which a scratch file may not be locked yet


@contextlib.contextmanager
def replacing(file: Path, what: str, size: int) -> Iterator[BinaryIO]:
    """A file to write and read, which takes the place of ``file`` when the block ends well.

    Nothing is left of it when the block fails. A process that is killed leaves it behind, under a
    hidden name that ends in ``SUFFIX``; the next one that writes the same file removes it.

    Args:
        file: what is to be replaced, or made.
        what: is written, for an error.
        size: bytes that will be written, for an error: about so many.

    Raises:
        OSError: the system refuses, for want of space or for another reason; the text says why,
            how many bytes it takes and how many are free.
    """
    _remove_unfinished(file)
    scratch = file.with_name(f".{file.name}.{uuid4().hex[:8]}{SUFFIX}")
    try:
        try:
            with scratch.open("x+b") as stream:
                with contextlib.suppress(OSError):  # where there are no locks, nothing is removed
                    fcntl.flock(stream, fcntl.LOCK_EX)  # for as long as this process lives
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                scratch.replace(file)
            _sync(file.parent)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        message = f"{what} cannot be written: {error.strerror or error} (it takes {size} bytes"
        with contextlib.suppress(OSError):  # the folder itself may be gone
            message += f"; {shutil.disk_usage(file.parent).free} are free there"
        message += ")"
        raise OSError(error.errno, message, str(file)) from error


def _sync(folder: Path) -> None:
    """Bring a folder's names onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot, and the file is there
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unfinished(file: Path) -> None:
    """Remove what killed processes left of ``file``: what nobody has locked."""
    name = glob.escape(f".{file.name}.")
    for left in file.parent.glob(f"{name}*{SUFFIX}"):
        with contextlib.suppress(OSError), left.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - left.stat().st_mtime > _YOUNG:
                left.unlink()
