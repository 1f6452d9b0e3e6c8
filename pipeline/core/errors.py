"""The one error type of the project.

Every mistake a user can make ends as one line on stderr: what is wrong, where, and what mends it.
A traceback from any stage or command is therefore a defect of ours, never of the user's data.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

# Exit codes: DVC reports any failure as 255, so the line itself must tell; the codes serve scripts.
USAGE, BAD_ROWS, ARTEFACT, RESOURCE, NUMERIC, INTERRUPTED = 2, 3, 4, 5, 7, 75

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class PipelineError(Exception):
    """A problem the user can mend.

    Args:
        what: what is wrong, with expected and got.
        where: file, row or parameter it was found in.
        remedy: the parameter or command that mends it.
        code: exit code of the process (see the constants above).
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "", code: int = USAGE) -> None:
        self.what, self.where, self.remedy, self.code = what, where, remedy, code
        super().__init__(self.line())

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes send errors back: subclasses have other constructors, so none is called again."""
        return _rebuild, (type(self), self.args, self.__dict__)

    def line(self) -> str:
        """One line of text, control characters and memory addresses removed."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.remedy:
            text += f" -> {self.remedy}"
        return _ADDRESS.sub("", _CONTROL.sub(" ", text))


def _rebuild(kind: type[PipelineError], args: tuple[Any, ...], state: dict[str, Any]) -> PipelineError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def brief(error: BaseException, *, limit: int = 160) -> str:
    """The first line of a library's error, short enough to quote in ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def exit_on_error(work: Callable[[], None]) -> NoReturn:
    """Run `work`; a `PipelineError` becomes one line on stderr and its exit code, Ctrl-C one line and 130.

    Whatever a library makes of a Ctrl-C that strikes inside it, this process ends as interrupted.
    """
    struck = _watch_interrupts()
    try:
        work()
    except PipelineError as error:
        print(f"error: {error.line()}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    except (Exception, KeyboardInterrupt) as error:
        if not struck and not isinstance(error, KeyboardInterrupt):
            raise
        print("interrupted: run the same command to go on", file=sys.stderr, flush=True)
        _leave(130)
    sys.exit(0)


def _leave(code: int) -> NoReturn:
    """End without tearing libraries down: a data loader that was interrupted halfway can wait for its workers for ever."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(code)


def _watch_interrupts() -> list[bool]:
    """A list that fills when SIGINT comes; one that Python would swallow (in a fork's hooks, say) is raised again."""
    struck: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        return struck
    plain = sys.unraisablehook

    def strike(number: int, frame: FrameType | None) -> None:
        struck.append(True)
        signal.default_int_handler(number, frame)

    def ignored(unraisable: "sys.UnraisableHookArgs") -> None:
        if not struck:
            plain(unraisable)
        elif issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)  # raised here it would be swallowed again

    sys.unraisablehook = ignored
    signal.signal(signal.SIGINT, strike)
    signal.signal(signal.SIGALRM, strike)
    return struck
