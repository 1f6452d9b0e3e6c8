"""Jobs in forked processes that are killed, or find the disk full, at a chosen call; and what they leave behind.

Reads and writes nothing of its own. The calls that change files are counted in an undisturbed run and then struck one by
one: before the call, and half-way through it where it can stop there. Dying behind a call leaves what dying before the
next one leaves, so these are all the states that a kill can leave between two calls. Needs os.fork, so no Windows.
"""

import errno
import gc
import json
import math
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import h5py
from tqdm import tqdm

from pipeline.core.errors import RESOURCE
from pipeline.core.frame import exit_on_error

WATCHED: dict[Any, str] = {  # whatever changes a file or makes it last, by who owns the name
    os: "mkdir rmdir unlink remove link symlink replace rename renames chmod fchmod truncate ftruncate posix_fallocate "
    "write writev pwrite pwritev sendfile copy_file_range fsync fdatasync",
    shutil: "copyfile",
    Path: "write_text write_bytes touch",
    h5py.File: "close",
}
FREES = {"rmdir", "unlink", "remove", "chmod", "fchmod", "close"}  # what a full disk does not refuse; HDF5: see `limit_files`
CHANGES = {"os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.rename", "os.chmod", "os.truncate"}  # audit events


def _cut(path: str | Path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def _half_closed(plain: Callable[..., Any], file: h5py.File) -> None:
    name = file.filename
    plain(file)
    _cut(name)


def _half_copied(plain: Callable[..., Any], source: Path, target: Path) -> None:
    plain(source, target)
    _cut(target)


HALVES: dict[str, Callable[..., Any]] = {  # how much of it is done when the process dies in the middle
    "pwrite": lambda plain, handle, data, offset: plain(handle, data[: len(data) // 2], offset),
    "posix_fallocate": lambda plain, handle, offset, size: plain(handle, offset, size // 2),
    "write_text": lambda plain, path, text, **options: plain(path, text[: len(text) // 2], **options),
    "close": _half_closed,
    "copyfile": _half_copied,
}

Strike = Callable[[int, str, Callable[..., Any], tuple[Any, ...]], None]


def watch(strike: Strike) -> Callable[[], bool]:
    """Call `strike(number, name, plain, arguments)` before each watched call of this process, from now on.

    A call within a watched one (a copy's writes) is part of it; returns a function that tells whether one is under way.
    For a process that is about to end: nothing is put back.
    """
    calls, inside = 0, False

    def watched(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls, inside
            if inside or (name == "close" and arguments[0].mode == "r"):
                return plain(*arguments, **options)
            inside, number, calls = True, calls, calls + 1
            try:
                strike(number, name, lambda *given: plain(*given, **options), arguments)
                return plain(*arguments, **options)
            finally:
                inside = False

        return call

    for owner, names in WATCHED.items():
        for name in names.split():
            if hasattr(owner, name):
                setattr(owner, name, watched(getattr(owner, name), name))
    return lambda: inside


def die(at: int, *, half: bool = False) -> Strike:
    """SIGKILL this process at call number `at`, when half of it is done or before it begins."""

    def strike(number: int, name: str, plain: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if number == at:
            if half:
                HALVES[name](plain, *arguments)
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def full_disk(at: int) -> Strike:
    """From call number `at` on, every call that needs room fails."""

    def strike(number: int, name: str, *_: Any) -> None:
        if number >= at and name not in FREES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return strike


def fail_once(at: int, number: int) -> Strike:
    """Call number `at` fails with an error of the system (`errno`), no other does."""

    def strike(call: int, *_: Any) -> None:
        if call == at:
            raise OSError(number, os.strerror(number))

    return strike


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: exit code (a signal is negative), what it printed, processor seconds and most bytes it took."""

    code: int
    text: str
    seconds: float
    memory: int = 0


LIMIT = 600.0  # seconds after which a process that does not end is ended, which no trial takes for right
TO_FOLLOW = 30.0  # seconds that helpers of a killed process have to end, too


def run(job: Callable[[], None], *, strike: Strike | None = None, kill_after: float | None = None, limit: float = LIMIT) -> Ended:
    """Run `job` in a forked process as a stage runs, its calls struck.

    It is killed with -9 when it has had `kill_after` seconds of processor time, which falls at the same place of its work on a
    busy machine as on a quiet one, and after `limit` seconds of a clock.
    """
    output, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        _be_child(job, strike, theirs)
    os.close(theirs)
    with os.fdopen(output, "rb", buffering=0) as text:
        printed, ends, killed = text.read(1), time.monotonic() + limit, False  # it has begun
        while not killed or time.monotonic() < ends:
            if select.select([text], [], [], 1.0 if killed or kill_after is None else 0.002)[0]:
                if not (data := text.read(1 << 16)):
                    break
                printed += data
            late = time.monotonic() > ends
            if not killed and (late or (kill_after is not None and _processor_seconds(process) >= kill_after)):
                os.kill(process, signal.SIGKILL)
                killed, ends = True, time.monotonic() + TO_FOLLOW
                printed += b"\nno end in time" if late else b""
        else:
            printed += b"\na helper goes on without it"
    _, status, used = os.wait4(process, 0)
    outlived = printed.endswith(b"without it")
    code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
    return Ended(1 if outlived else code, printed[1:].decode(errors="replace"), seconds, used.ru_maxrss << 10)


def _processor_seconds(process: int) -> float:
    """What a process has had of all processors; its clock's number is made as clock_getcpuclockid(3) makes it."""
    try:
        return time.clock_gettime(~process << 3 | 2)
    except OSError:  # it has ended
        return math.inf


def _be_child(job: Callable[[], None], strike: Strike | None, output: int) -> NoReturn:
    code = 1
    try:
        gc.disable()  # a collection would touch, and so copy, all that was inherited
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        tqdm.set_lock(threading.RLock())  # its own lock is shared with forked processes and stays locked when one dies in it
        os.write(2, b".")
        if strike:
            watch(strike)
        exit_on_error(job)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Trials:
    """Disturbs jobs that fill an empty folder one after the other (`steps`), each time in a new folder below `scratch`.

    A trial returns what is wrong, or nothing. Right is: what stands under a final name is whole at all times, and a
    resumed run ends with the files of an undisturbed one, byte for byte, and no other.
    """

    def __init__(self, steps: Sequence[Callable[[Path], None]], scratch: Path, *, strict: bool = True) -> None:
        """Raises RuntimeError when the steps fail undisturbed or, if `strict`, change a file by a call that is not watched."""
        self._steps, self._scratch, self._strict = steps, scratch, strict
        self._whole: set[tuple[str, int, bytes]] = set()
        self.expected: set[tuple[str, int, bytes]] = set()
        with self.folder() as folder:
            lengths = []
            for step in steps:
                ended = run(partial(step, folder))
                if ended.code:
                    raise RuntimeError(f"undisturbed, it ends with {ended.code}: {ended.text}")
                lengths.append(ended.seconds)
                self.expected = contents(folder)
                self._whole |= self.expected
        self.seconds = sum(lengths)
        self.calls = self._list_calls()

    def _list_calls(self) -> list[str]:
        names: list[str] = []

        def job(folder: Path) -> None:
            is_watched = watch(lambda _, name, *__: names.append(name))
            if self._strict:
                sys.addaudithook(partial(_refuse_unwatched, folder, is_watched))
            self.work(folder)
            print("\n" + json.dumps(names))

        with self.folder() as folder:
            ended = run(partial(job, folder))
        if ended.code:
            raise RuntimeError(f"counting its calls ends with {ended.code}: {ended.text}")
        return json.loads(ended.text.splitlines()[-1])

    def work(self, folder: Path) -> None:
        """All steps, in this process."""
        for step in self._steps:
            step(folder)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder for one trial."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            yield Path(name)

    def points(self) -> list[tuple[int, bool]]:
        """Every (call, half-way) there is to die at."""
        halves = [(number, True) for number, name in enumerate(self.calls) if name in HALVES]
        return sorted([(number, False) for number in range(len(self.calls))] + halves)

    def kill_at(self, call: int, half: bool) -> str:
        """Die at one of `points`, then resume."""
        what = f"killed {'within' if half else 'before'} call {call}, {self.calls[call]}"
        with self.folder() as folder:
            ended = run(lambda: self.work(folder), strike=die(call, half=half))
            return self.judge(folder, what, ended, ended.code == -signal.SIGKILL)

    def kill_after(self, *shares: float) -> str:
        """Die after these shares of an undisturbed run's length, one run after the other, then resume.

        A run that was quicker than its kill is no trial: another one dies earlier.
        """
        what = f"killed after {', '.join(f'{share:.0%}' for share in shares)} of its time"
        with self.folder() as folder:
            ends = [run(lambda: self.work(folder), kill_after=share * self.seconds) for share in shares]
            if all(ended.code == -signal.SIGKILL for ended in ends):
                return self.judge(folder, what, ends[-1], True)
            failed = [ended for ended in ends if ended.code not in (0, -signal.SIGKILL)]
            if failed:
                return self.judge(folder, what, failed[0], False)
        return self.kill_after(*(share * 0.7 for share in shares))

    def fill_disk(self, call: int) -> str:
        """The disk is full from this call on; the next run has room."""
        with self.folder() as folder:
            ended = run(lambda: self.work(folder), strike=full_disk(call))
            return self.judge(folder, f"disk full from call {call}, {self.calls[call]}", ended, is_one_line(ended))

    def fail_at(self, call: int, number: int) -> str:
        """One call fails and those after it do not; what did not need it may go on."""
        with self.folder() as folder:
            ended = run(lambda: self.work(folder), strike=fail_once(call, number))
            what = f"{errno.errorcode[number]} at call {call}, {self.calls[call]}"
            return self.judge(folder, what, ended, ended.code == 0 or is_one_line(ended))

    def limit_files(self, size: int) -> str:
        """No file grows beyond `size` bytes, which also strikes what HDF5 writes by itself; the next run has room."""

        def job() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            self.work(folder)

        with self.folder() as folder:
            ended = run(job)
            return self.judge(folder, f"files limited to {size} bytes", ended, is_one_line(ended))

    def judge(self, folder: Path, what: str, ended: Ended, as_it_should: bool) -> str:
        """What is wrong with how a disturbed run ended, with what it left, or with what a next one makes of that."""
        if not as_it_should:
            return f"{what}: ended with {ended.code} and {ended.text[-300:]!r}"
        torn = sorted(name for name, *rest in contents(folder) - self._whole if not _is_temporary(name))
        if torn:
            return f"{what}: not whole under a final name: {', '.join(torn)}"
        resumed = run(lambda: self.work(folder))
        if resumed.code:
            return f"{what}: resuming ends with {resumed.code} and {resumed.text[-300:]!r}"
        other = sorted({name for name, *_ in contents(folder) ^ self.expected})
        return f"{what}: after resuming these differ: {', '.join(other)}" if other else ""


def contents(folder: Path) -> set[tuple[str, int, bytes]]:
    """Everything below a folder: name, mode, and a file's SHA-256."""
    found = set()
    for path in folder.rglob("*"):
        mode = path.stat().st_mode
        found.add((str(path.relative_to(folder)), mode, sha256(path.read_bytes()).digest() if stat.S_ISREG(mode) else b""))
    return found


def _is_temporary(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def is_one_line(ended: Ended) -> bool:
    """A user's error: a line of its own at the end, whatever a progress bar drew, and the exit code of a lack of room."""
    lines = ended.text.replace("\r", "\n").splitlines()
    return ended.code == RESOURCE and sum("error: " in line for line in lines) == 1 and lines[-1].startswith("error: ")


def _refuse_unwatched(folder: Path, is_watched: Callable[[], bool], event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578): Python says what it is about to do to files, so a call that WATCHED lacks is noticed."""
    creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_TRUNC)
    if (creates or event in CHANGES) and str(arguments[0]).startswith(str(folder)) and not is_watched():
        raise RuntimeError(f"{event} of {arguments[0]} is not watched")
