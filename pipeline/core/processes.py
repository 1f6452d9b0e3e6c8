"""Helper processes of this one: forked, ended with it whatever happens, told apart by how they ended."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

SAFE_FORK = sys.platform.startswith("linux")  # elsewhere libraries do not survive it
PR_SET_PDEATHSIG = 1
TO_DIE = 5.0  # seconds until a process that was killed is given up


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process sent a signal when its parent is killed with -9; it would go on otherwise. Linux only."""
    if SAFE_FORK:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)


def fork_process(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own and return its number; it never comes back to the caller's code.

    Ctrl-C is the parent's business, and the parent's end is the end of it.
    """
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:  # else it died before it was asked to tell
            work()
        code = 0
    finally:
        os._exit(code)


def end_process(process: int, *, grace: float = 0.0) -> str:
    """Kill a helper unless it ends by itself within `grace` seconds, and say how it did: "" where it was killed here.

    One that hangs in the kernel (a dead network mount) is left behind: it dies when the read returns.
    """
    if status := _status_within(process, grace):
        return status
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    _status_within(process, TO_DIE)
    return ""


def _status_within(process: int, seconds: float) -> str | None:
    until = time.monotonic() + seconds
    while (status := _status(process)) is None and time.monotonic() < until:
        time.sleep(0.005)
    return status


def _status(process: int) -> str | None:
    """How a child ended, None while it runs."""
    try:
        found, status = os.waitpid(process, os.WNOHANG)
    except ChildProcessError:
        return "somebody else"
    if not found:
        return None
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
