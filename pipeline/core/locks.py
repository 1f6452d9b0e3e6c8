"""Who writes what: locks that end with the process that holds them, however it ends.

`flock` on an open file, which a fork gives up at once, so that a worker that outlives its parent holds nothing. Nothing looks
at dates, and process numbers count only where a file system knows no locks.
"""

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path

from pipeline.core.errors import BUSY, PipelineError

PATIENCE = 10.0  # seconds that a process which has just been told to end has for it

_held: set[int] = set()
_warned: set[str] = set()


def _forget() -> None:
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def machine() -> str:
    """This machine's name, without what separates parts of file names."""
    return socket.gethostname().replace(".", "-")


@contextmanager
def hold(name: str, folder: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock `folder`/`name`.lock; one that is held is waited for so many seconds.

    Raises `PipelineError` naming the process that holds it, its command, and since when it does.
    """
    path, ends, told = folder / f"{name}.lock", time.monotonic() + patience, False
    while (handle := _take(path)) is None:
        holder = _holder(path)
        if time.monotonic() >= ends:
            raise PipelineError(f"is being written by {holder}", where=name, remedy="let it finish, or end it", code=BUSY)
        if not told:
            print(f"{name}: waiting for {holder}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)
    said = {"pid": os.getpid(), "machine": machine(), "command": _command(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(said).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for it looks whether it is still this one
        release(handle)


def is_held(name: str, folder: Path) -> bool:
    """Whether some process holds the lock now."""
    path = folder / f"{name}.lock"
    if not path.exists():
        return False
    handle = _take(path)
    if handle is None:
        return True
    release(handle)
    return False


def own(path: Path, *, folder: bool) -> int:
    """Make `path`, an empty file or folder, this process's own until `release`; returns the handle. Raises `OSError`."""
    while True:
        if folder:
            path.mkdir(parents=True)
        else:
            path.touch(exist_ok=False)
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        if _lock(handle, wait=True) is not False and _is_at(handle, path):
            _held.add(handle)
            return handle
        os.close(handle)  # somebody who cleans up was faster


def release(handle: int) -> None:
    """Give up what `own` or `hold` took."""
    _held.discard(handle)
    with suppress(OSError):
        os.close(handle)


def holds_any() -> bool:
    """Whether this process is writing something, or keeps others from it."""
    return bool(_held)


def is_abandoned(path: Path, process: int, host: str) -> int | None:
    """A handle on a temporary file whose owner is gone, to be released once the file is removed; None where it may live."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    got = _lock(handle)
    if got is None:  # no locks here: another machine's processes cannot be asked
        got = host == machine() and process != os.getpid() and not is_alive(process)
    if got:
        return handle
    os.close(handle)
    return None


def _take(path: Path) -> int | None:
    """A handle on the lock, None where another holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PipelineError(f"cannot be locked: {error.strerror or error}", where=str(path), code=BUSY) from None
    got = _lock(handle)
    if got is None:
        _warn(path.parent)
        said = _said(path)
        other = int(str(said.get("pid", 0)))
        got = not (said.get("machine") == machine() and other not in (0, os.getpid()) and is_alive(other))
    if got and _is_at(handle, path):
        _held.add(handle)
        return handle
    os.close(handle)
    return None


def _lock(handle: int, *, wait: bool = False) -> bool | None:
    """Whether the lock is ours; None where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError as error:
        return False if error.errno in (EAGAIN, EACCES) else None


def _warn(folder: Path) -> None:
    if str(folder) not in _warned:
        _warned.add(str(folder))
        print(f"{folder}: this file system has no locks, so see to it that no run is started twice", file=sys.stderr, flush=True)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _said(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and isinstance(found.get("pid", 0), int) else {}
    except (OSError, ValueError):
        return {}


def _holder(path: Path) -> str:
    said = _said(path)
    if not said:
        return "another process"
    where = "" if said.get("machine") == machine() else f" on {said.get('machine')}"
    return f"process {said.get('pid')}{where} ({said.get('command')}), since {said.get('since')}"


def _command() -> str:
    words = [os.path.basename(sys.executable), *sys.orig_argv[1:]]
    text = shlex.join(words)
    return text if len(text) <= 120 else text[:119] + "…"


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        return True
    return True
