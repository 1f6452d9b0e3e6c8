"""A person at a terminal: a command in a pseudo-terminal, keys pressed when its screen shows what they wait for."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

from projects import with_path

ROOT = Path(__file__).parents[2]
CTRL_C, CTRL_D = "\x03", "\x04"


@dataclass
class Session:
    """`python -m pipeline.chat`, or another `command` of Python's, with these arguments; a context, which ends it in any case."""

    arguments: list[str]
    command: list[str] = field(default_factory=lambda: ["-m", "pipeline.chat"])
    screen: str = ""
    size: tuple[int, int] = (24, 80)
    env: dict[str, str] = field(default_factory=dict)
    _seen: int = 0

    def __enter__(self) -> "Session":
        self._master, slave = pty.openpty()
        self._resize(self._master)
        self.process = subprocess.Popen(
            [sys.executable, *self.command, *self.arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": with_path(ROOT), "TERM": "xterm-256color", **self.env},
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Keys, as bytes of UTF-8 (lone surrogates: as they are)."""
        os.write(self._master, text.encode("utf-8", "surrogateescape"))

    def until(self, text: str, *, timeout: float = 60) -> None:
        """Read the screen until it shows `text` behind what an earlier call waited for."""
        end = time.monotonic() + timeout
        while (at := self.screen.find(text, self._seen)) < 0:
            if not self._read(end):
                raise AssertionError(f"{text!r} did not come:\n{self.screen}")
        self._seen = at + len(text)

    def wait_for_more(self, *, timeout: float = 60) -> None:
        """Read until the screen shows anything behind what an earlier call waited for."""
        end = time.monotonic() + timeout
        while len(self.screen) <= self._seen:
            assert self._read(end), f"nothing came:\n{self.screen}"

    def press(self, key: str, text: str) -> None:
        """Type a key at the prompt until the screen answers: readline may sleep through one that comes just before it does."""
        for _ in range(8):
            self.type(key)
            try:
                return self.until(text, timeout=3)
            except AssertionError:
                continue
        self.type(key)
        return self.until(text)

    def read(self, seconds: float) -> None:
        """Whatever the screen shows within this time."""
        end = time.monotonic() + seconds
        while self._read(end):
            pass

    def resize(self, rows: int, columns: int) -> None:
        """As a window manager does it: the terminal's size, then SIGWINCH."""
        self.size = (rows, columns)
        self._resize(self._master)
        self.process.send_signal(signal.SIGWINCH)

    def _resize(self, terminal: int) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *self.size, 0, 0))

    def end(self, *, timeout: float = 60) -> int:
        """Its exit code, once it has ended by itself; what it wrote is on the screen."""
        end = time.monotonic() + timeout
        while self._read(end):
            pass
        return self.process.wait(timeout=max(1.0, end - time.monotonic()))

    def _read(self, end: float) -> bool:
        """One more piece of the screen; False once the terminal is closed or the time is over."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
        try:
            piece = os.read(self._master, 65536) if ready else b""
        except OSError:  # the other side is closed
            return False
        self.screen += piece.decode("utf-8", "replace")
        return bool(piece)


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
