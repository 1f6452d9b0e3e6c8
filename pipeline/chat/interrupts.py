"""What Ctrl-C does at each moment of a talk. No exception ever travels through a library: work is told to stop instead."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOPPED = 130  # as shells give it
SIGNALS = (signal.SIGINT, signal.SIGALRM)  # the second repeats one that Python swallowed: see pipeline/core/frame.py
PRESSES = 3  # while one answer is being stopped: then the person wants out


class Interrupts:
    """At the prompt Ctrl-C is a KeyboardInterrupt; while an answer is made it sets `stop`, and pressed thrice it ends all.

    A context: from then on the signal is ours. Behind it, the signal is ignored, so that nothing can strike the way out.
    """

    def __init__(self) -> None:
        self.stop, self._asking, self._presses = threading.Event(), False, 0

    def __enter__(self) -> "Interrupts":
        for number in SIGNALS:
            signal.signal(number, self._strike)
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def ask(self, prompt: str) -> str:
        """A line from the person; raises KeyboardInterrupt and EOFError as `input` does, and at no other moment."""
        try:
            self._asking, self._presses = True, 0
            if self.stop.is_set():  # pressed between an answer and this: meant for here
                raise KeyboardInterrupt
            if sys.stdout.isatty():
                return input(prompt)
            print(prompt, end="", file=sys.stderr, flush=True)  # stdout is a pipe, which gets answers alone
            return input()
        finally:
            self._asking = False
            self.stop.clear()

    def _strike(self, number: int, frame: FrameType | None) -> None:
        if self._asking:
            self._asking = False
            signal.default_int_handler(number, frame)
        self._presses += 1
        self.stop.set()
        if self._presses >= PRESSES:
            leave()


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """While a model loads, or nobody is there to ask on: Ctrl-C ends the process with 130 and one line.

    A signal that is not ours to handle (another thread's, or none) stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: leave())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave() -> NoReturn:
    """End here and now: libraries that are torn down while their threads work can abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os.write(2, b"\ninterrupted\n")
    os._exit(STOPPED)
