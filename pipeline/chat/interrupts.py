"""What Ctrl-C does at each moment of a talk. No exception ever travels through a library: work is told to stop instead."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOPPED = 130  # as shells give it
SIGNALS = (signal.SIGINT, signal.SIGALRM)  # the second repeats one that Python swallowed: see pipeline/core/frame.py
PATIENCE = 0.05  # seconds within which a prompt answers a signal, unless readline sleeps through it
PRESSES = 3  # while one answer is being stopped: then the person wants out


class Interrupts:
    """At the prompt Ctrl-C is a KeyboardInterrupt; while an answer is made it sets `stop`, and pressed thrice it ends all.

    A context: from then on the signal is ours. Behind it, the signal is ignored, so that nothing can strike the way out.

    A signal that comes just before readline waits for a key is noted by Python and slept through by readline. So each one
    leaves a byte that its handler takes, and where a byte stays at the prompt a thread sends the signal once more.
    """

    def __init__(self) -> None:
        self.stop, self._asking, self._presses = threading.Event(), False, 0

    def __enter__(self) -> "Interrupts":
        for number in SIGNALS:
            signal.signal(number, self._strike)
        self._noted, self._notes = socket.socketpair()
        for end in (self._noted, self._notes):
            end.setblocking(False)
        self._before = signal.set_wakeup_fd(self._notes.fileno(), warn_on_full_buffer=False)
        self._over = threading.Event()
        self._waker = threading.Thread(target=self._wake, daemon=True)
        self._waker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._before)
        self._over.set()
        self._notes.close()  # wakes the thread
        self._waker.join()
        self._noted.close()

    def _wake(self) -> None:
        """Send a signal again that nobody has handled at the prompt."""
        while not self._over.is_set():
            select.select([self._noted], [], [])
            time.sleep(PATIENCE)
            with suppress(OSError):  # nothing is left: it was handled
                ours = set(self._noted.recv(64, socket.MSG_PEEK)) & set(SIGNALS)
                if ours and self._asking:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                elif not ours:
                    self._noted.recv(64)

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
        with suppress(OSError):
            self._noted.recv(64)
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
