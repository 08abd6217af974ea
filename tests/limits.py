"""Limits of the system, set for a while, under which files cannot be written."""

import resource
import signal
from contextlib import contextmanager


@contextmanager
def largest_file(size):
    """No file of this process may grow beyond so many bytes: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
