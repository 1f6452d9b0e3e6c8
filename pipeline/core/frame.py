"""The frame of every stage and command: whatever happens inside ends as one line on stderr and an exit code.

`--debug`, or GLANCE_DEBUG=1 in the environment, puts the traceback before the line. What is neither a user's mistake nor the
machine's says that it is a defect of this program. No helper outlives it: a process that cannot end by itself is ended.
"""

import errno
import io
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Any, NoReturn

from pipeline.core.errors import DEFECT, RESOURCE, PipelineError, brief
from pipeline.core.locks import holds_any

DEBUG = "GLANCE_DEBUG"
LAUNCHED = "GLANCE_SAID"  # set in the processes of a launch, whose launcher tells an unexpected error once for all
CLOSED = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1  # what a shell sees when `| head` has had enough
ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
PRESSES = 3  # of Ctrl-C, which end an import too
GRACE = 2.0  # seconds that threads have to come back when a run has failed
_struck: list[int] = []  # signals that this process is to end by
_watching = [0]  # the process whose signals these are: one that is forked from it has others to tell
_NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
_REMEDIES = {
    errno.EMFILE: "raise the number of files a process may open: ulimit -n 4096",
    errno.ENFILE: "close other programs: the machine has too many files open",
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space: the quota is used up",
}


def run_command(command: Callable[[], object]) -> NoReturn:
    """The whole work of a process, its command line included, which may hold `--debug` anywhere.

    Told to end (SIGTERM, SIGHUP), it removes what it was writing first, as after Ctrl-C.
    """
    take_debug()
    for number in ENDS:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _strike)
    exit_on_error(command)


def take_debug() -> None:
    """Move `--debug` from the command line to the environment, where processes that are started find it too."""
    if "--debug" in sys.argv[1:]:
        sys.argv.remove("--debug")
        os.environ[DEBUG] = "1"


def debugging() -> bool:
    """Whether tracebacks were asked for."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def exit_on_error(work: Callable[[], object], *, memory: str = "") -> NoReturn:
    """Run `work`; any exception becomes one line on stderr and an exit code, Ctrl-C one line and 130.

    Whatever a library makes of a Ctrl-C that strikes inside it, this process ends as interrupted. `memory` names the
    parameters that mend a lack of memory.
    """
    _open_standard_streams()
    _refuse_pipes()
    before = set(threading.enumerate())
    _watch_interrupts()
    try:
        work()
        sys.stdout.flush()
    except SystemExit as end:
        if _struck and end.code:  # a page or a talk that is ended so has done what it was to do
            _leave_interrupted(end)
        if not isinstance(end.__context__, BrokenPipeError):  # Rich's way to say that nobody reads
            _drop_broken_output()
            raise
        code = _tell(end.__context__, memory)
    except BaseException as error:
        if _struck or isinstance(error, KeyboardInterrupt):
            _leave_interrupted(error)
        code = _tell(error, memory)
        if code == DEFECT and LAUNCHED in os.environ:
            raise
    else:
        code = 0
    if code:
        _end_helpers(before, code)
    sys.exit(code)


def as_line(error: BaseException, *, memory: str = "") -> PipelineError:
    """The one line for any exception: a user's mistake as it is, the machine's refusals, and defects of this program."""
    if isinstance(error, PipelineError):
        return error
    if _is_lack_of_memory(error):
        remedy = memory or "close other programs, or take a smaller model"
        return PipelineError(f"out of memory: {brief(error)}", remedy=remedy, code=RESOURCE)
    if isinstance(error, OSError):
        where = next((str(name) for name in (error.filename2, error.filename) if name is not None), "")
        remedy = _REMEDIES.get(error.errno or 0, "") or ("" if where else f"{DEBUG}=1 shows where")
        return PipelineError(error.strerror or brief(error), where=where, remedy=remedy, code=RESOURCE)
    what = f"unexpected {type(error).__name__}: {brief(error)}{_place(error)}"
    return PipelineError(what, remedy=f"this is a defect of the program; {DEBUG}=1 shows the traceback", code=DEFECT)


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def _place(error: BaseException) -> str:
    """The innermost line of this project that an exception went through."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root + os.sep)]
    ours = [frame for frame in ours if "site-packages" not in frame.filename and frame.filename != __file__]
    return f" (at {os.path.relpath(ours[-1].filename, root)}:{ours[-1].lineno})" if ours else ""


def _tell(error: BaseException, memory: str) -> int:
    """Print the line, unless nobody can read it or the launcher will; returns the exit code."""
    broken = _drop_broken_output()
    if broken is not None and isinstance(error, OSError):
        gone = broken.errno == errno.EPIPE
        what = "was closed before the end" if gone else f"cannot be written: {broken.strerror}"
        line = PipelineError(what, where="standard output", code=CLOSED if gone else RESOURCE)
    else:
        line = as_line(error, memory=memory)
    if line.code == DEFECT and LAUNCHED in os.environ:
        return line.code
    with suppress(OSError, ValueError):
        if debugging():
            traceback.print_exception(error)
        print(f"error: {line.line()}", file=sys.stderr, flush=True)
    return line.code


class _Output(io.FileIO):
    """Standard output that remembers its failure: an error of a write elsewhere looks just like it."""

    failed: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            _Output.failed = error
            raise


def _drop_broken_output() -> OSError | None:
    """What keeps standard output from being written; it then goes nowhere, or Python would complain at its end."""
    with suppress(OSError):
        sys.stdout.flush()
    failed = _Output.failed
    if failed is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    return failed


def _open_standard_streams() -> None:
    """A closed stream becomes one that goes nowhere: else the next file that is opened would take its number and its text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    plain = sys.stdout
    if plain is sys.__stdout__ and isinstance(plain, io.TextIOWrapper):
        plain.flush()
        at_once = plain.line_buffering or plain.write_through
        buffer = io.BufferedWriter(_Output(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(buffer, plain.encoding, "backslashreplace", line_buffering=at_once)
    for stream in (sys.stderr, sys.stdin):
        if isinstance(stream, io.TextIOWrapper):  # a name that no terminal can show ends nothing, nor do bytes that are no text
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")


@cache
def _refuse_pipes() -> None:
    """A named pipe where a file should be is refused like any other that cannot be opened: nobody may ever write to it.

    Those of a shell, `<(...)` and standard input, lie below /dev.
    """

    def look(event: str, given: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(given[0], str | bytes):
            return
        path = os.fsdecode(given[0])
        if path.startswith(("/dev/", "/proc/")) or given[2] & os.O_NONBLOCK:
            return
        try:
            is_pipe = stat.S_ISFIFO(os.stat(path).st_mode)
        except (OSError, ValueError):
            return
        if is_pipe:
            raise OSError(errno.EINVAL, "a pipe, expected a file", path)

    sys.addaudithook(look)


def _end_helpers(before: set[threading.Thread], code: int) -> None:
    """Wait a little for threads of a failed run; one that hangs in a read would keep Python from ending."""
    for child in multiprocessing.active_children():
        child.kill()
    until = time.monotonic() + GRACE
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                _leave(code)


def _leave(code: int) -> NoReturn:
    """End without tearing libraries down: what was interrupted halfway can wait for its helpers for ever."""
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _leave_interrupted(error: BaseException) -> NoReturn:
    with suppress(OSError, ValueError):
        if debugging():
            traceback.print_exception(error)
        print("interrupted: run the same command to go on", file=sys.stderr, flush=True)
    _leave(128 + (_struck or [signal.SIGINT])[-1])


def _strike(number: int, frame: FrameType | None) -> None:
    """Ctrl-C is Python's exception; whatever else ends a process is one that nobody takes for a press of Ctrl-C."""
    if number != signal.SIGALRM:
        _struck.append(number)
    if len(_struck) < PRESSES and _is_importing(frame):  # C++ that is being loaded aborts when Python raises in it
        if os.getpid() == _watching[-1] and not holds_any():
            _leave_interrupted(KeyboardInterrupt())
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # what is half written is removed first
        return
    if _struck[-1:] not in ([], [signal.SIGINT]):
        raise SystemExit(128 + _struck[-1])
    signal.default_int_handler(number, frame)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def _watch_interrupts() -> None:
    """Note every signal that ends this process; one that Python would swallow (in a fork's hooks, say) is raised again."""
    if threading.current_thread() is not threading.main_thread():
        return
    _struck.clear()
    _watching[:] = [os.getpid()]
    plain = sys.unraisablehook

    def ignored(unraisable: "sys.UnraisableHookArgs") -> None:
        if not _struck:
            plain(unraisable)
        elif issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
            signal.setitimer(signal.ITIMER_REAL, 0.1)  # raised here it would be swallowed again

    sys.unraisablehook = ignored
    signal.signal(signal.SIGINT, _strike)
    signal.signal(signal.SIGALRM, _strike)
