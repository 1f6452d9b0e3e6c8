"""A bound on memory that holds for C as well: what a small file unpacks to is known only when it is unpacked."""

import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_DATA = 5  # the place in /proc/self/statm of the pages that this process may write


@contextmanager
def bounded_memory(most: int) -> Iterator[None]:
    """Whoever asks for more than `most` bytes in addition has a MemoryError, or what a library makes of one.

    On Linux, and in the main thread, since the system bounds processes: another thread's wish would count as well.
    """
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        yield
        return
    with open("/proc/self/statm", "rb") as file:
        taken = int(file.read().split()[_DATA]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [taken + most, *(bound for bound in before if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
