"""Every call to the system by which a writer changes files, whoever makes it (Python, HDF5, Arrow, safetensors), struck once.

A forked process has itself traced by strace(1), which kills it with -9 before the call, or lets the call fail. Calls are those of
the thread that writes; a test of the list is that no other thread changes a file. What is written through mapped memory is no call.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.kills import Trials, is_one_line, run

OPENS = ("openat", "open", "creat")
FREES = {"unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat"}  # what a full disk does not refuse
CHANGES = {
    *OPENS, *FREES, "mkdir", "mkdirat", "write", "writev", "pwrite64", "pwritev", "pwritev2", "fallocate", "ftruncate", "truncate",
    "copy_file_range", "sendfile", "fsync", "fdatasync", "msync", "rename", "renameat", "renameat2", "link", "linkat", "symlink",
    "symlinkat",
}  # fmt: skip
TO_START = 30.0  # seconds
CALL = re.compile(r"(\d+) +(\w+)\((.*)")


class Call(NamedTuple):
    """The `ordinal`-th call of a name in its thread, from 1 on."""

    name: str
    ordinal: int


def can_trace() -> bool:
    """Whether strace is there and may trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False, timeout=TO_START).returncode == 0


def _traced(job: Callable[[], None], log: Path, *options: str) -> None:
    """Have this process traced, then work."""
    command = ["strace", "-y", "-s", "0", "-o", str(log), *options, "-p", str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + TO_START
    while "\nTracerPid:\t0\n" in Path("/proc/self/status").read_text(encoding="utf-8"):
        if time.monotonic() > ends:
            raise TimeoutError("strace does not begin")
        time.sleep(0.002)
    job()


class Syscalls:
    """Strikes the jobs of `trials` at `points`; a trial returns what is wrong, or nothing."""

    def __init__(self, trials: Trials, scratch: Path) -> None:
        """Raises RuntimeError where a thread beside the first one changes files."""
        self._trials, self._log = trials, scratch / "strace.log"
        with trials.folder() as folder:
            names = ",".join(sorted(f"?{name}" for name in CHANGES))
            ended = run(partial(_traced, partial(trials.work, folder), self._log, "-f", "-e", f"trace={names}"))
            if ended.code:
                raise RuntimeError(f"traced, it ends with {ended.code}: {ended.text[-300:]}")
            counts: Counter[tuple[str, str]] = Counter()
            found: list[tuple[str, Call]] = []
            for line in self._lines():
                if (match := CALL.match(line)) is None:
                    continue
                thread, name, rest = match.groups()
                counts[thread, name] += 1
                if str(folder) in rest and (name not in OPENS or "O_CREAT" in rest or "O_TRUNC" in rest):
                    found.append((thread, Call(name, counts[thread, name])))
        if len({thread for thread, _ in found}) != 1:
            raise RuntimeError(f"{len({thread for thread, _ in found})} threads change files")
        self.points = [call for _, call in found]

    def _lines(self) -> list[str]:
        """The log, once the traced process's end stands in it."""
        ends = time.monotonic() + TO_START
        while True:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines() if self._log.exists() else []
            if (lines and "+++" in lines[-1]) or time.monotonic() > ends:
                return lines
            time.sleep(0.002)

    def kill(self, call: Call) -> str:
        """Die before a call, then resume."""
        return self._strike(call, "signal=KILL", "killed")

    def fail(self, call: Call, number: int) -> str:
        """A call fails and those after it do not; what did not need it may go on."""
        return self._strike(call, f"error={errno.errorcode[number]}", errno.errorcode[number])

    def _strike(self, call: Call, how: str, what: str) -> str:
        what = f"{what} at {call.name} number {call.ordinal}"
        options = ("-e", f"trace={call.name}", "-e", f"inject={call.name}:{how}:when={call.ordinal}")
        with self._trials.folder() as folder:
            self._log.unlink(missing_ok=True)
            ended = run(partial(_traced, partial(self._trials.work, folder), self._log, *options))
            calls = [line for line in self._lines() if line.startswith(f"{call.name}(")]
            if len(calls) < call.ordinal or str(folder) not in calls[call.ordinal - 1]:
                return f"{what}: it struck something else: {calls[call.ordinal - 1 :][:1]}"
            killed = ended.code == -signal.SIGKILL
            right = killed if "signal" in how else ended.code == 0 or is_one_line(ended)
            return self._trials.judge(folder, f"{what} ({calls[call.ordinal - 1][:200]})", ended, right)
