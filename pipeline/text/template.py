"""A tokenizer's chat template: conversations in, text out, by a process that the operating system bounds (see `sandbox`).

One such process serves all templates of this one; it is started at the first rendering, and again after it had to be ended.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core import ARTEFACT, BAD_ROWS, RESOURCE, PipelineError
from pipeline.text import sandbox

OTHERS = "choose another llm.model: docs/templates.md names the families that work"
DATE = "2024-07-26"  # the one that Llama 3's own templates name where they are told none
WAIT = 60.0  # seconds without an answer, on a machine however busy; processor time is bounded to one
TOGETHER = 64  # conversations a question

Message = dict[str, str]
Talk = tuple[list[Message], bool]  # and whether the answer is yet to come


class Template:
    """Renders conversations as `apply_chat_template` does, on one date and within limits.

    Args:
        source: Jinja source.
        variables: what the template may name, such as the tokenizer's special tokens.
        date: YYYY-MM-DD, what `strftime_now` knows.
        where: of the errors, the model's name.

    Attributes:
        words: pieces of text that it looks for in contents; `whole`: contents that it compares with.
        dated: whether it asks for the date; `dates`: the spellings that it asks for, by their format.

    Raises `PipelineError` when it is no template, or exceeds a limit: then again at every later call.
    """

    def __init__(self, source: str, variables: dict[str, Any], *, date: str = DATE, where: str) -> None:
        self._asked: dict[str, Any] = {"template": source, "variables": variables, "date": date}
        self._where, self._stopped = where, ""
        self.words: tuple[str, ...] = ()
        (facts,) = self._ask([None], {})
        if "error" in facts:
            raise PipelineError(f"its chat template is none: {facts['error']}", where=where, remedy=OTHERS, code=ARTEFACT)
        self.words, self.whole, self.dated = tuple(facts["words"]), frozenset(facts["whole"]), bool(facts["dated"])
        self.dates: dict[str, str] = facts["dates"]

    def render(self, talks: Sequence[Talk], options: dict[str, Any]) -> list[str]:
        """Each talk's text; raises `PipelineError` for the first that the template refuses."""
        jobs = [{"messages": messages, "add_generation_prompt": generate} for messages, generate in talks]
        texts = []
        for (messages, _), found in zip(talks, self._ask(jobs, options), strict=True):
            if "error" in found:
                roles = ", ".join(message["role"] for message in messages)
                raise PipelineError(f"its chat template refuses turns {roles}: {found['error']}", where=self._where, code=BAD_ROWS)
            texts.append(str(found["text"]))
        return texts

    def _ask(self, jobs: Sequence[dict[str, Any] | None], options: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        asked = self._asked | {"variables": {"tools": None, "documents": None, **self._asked["variables"], **options}}
        for start in range(0, len(jobs), TOGETHER):
            if not self._stopped:
                found += _process().ask(asked, jobs[start : start + TOGETHER])
                self._stopped = next((answer["over"] for answer in found if "over" in answer), "")
            if self._stopped:
                raise PipelineError(
                    f"its chat template was stopped: it {self._stopped}",
                    where=self._where,
                    remedy=OTHERS,
                    code=ARTEFACT,
                )
        return found


class _Process:
    """The rendering process of this process; several threads may ask, one is answered at a time."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._started: subprocess.Popen[bytes] | None = None
        self._read = [b""]  # of its answers, beyond those that were taken

    def ask(self, asked: dict[str, Any], jobs: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
        """An answer a job, up to and with the first that was stopped."""
        question = json.dumps(asked | {"jobs": jobs}).encode() + b"\n"
        with self._lock:
            answers: list[dict[str, Any]] = []
            try:
                self._write(question)
                while len(answers) < len(jobs):
                    answers.append(json.loads(self._line()))
            except _EndedError as ended:
                answers.append({"over": str(ended)})
            except BaseException:  # an interrupt leaves answers behind that the next question must not get
                self.end()
                raise
            return answers

    def _write(self, question: bytes) -> None:
        if self._started is None or self._started.poll() is not None:
            script = str(Path(sandbox.__file__))
            try:
                self._started = subprocess.Popen(
                    [sys.executable, "-P", script],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,
                    env=os.environ | {"TZ": "UTC"},
                )
            except OSError as error:
                raise PipelineError(f"cannot start the rendering of chat templates: {error.strerror}", code=RESOURCE) from None
        assert self._started.stdin is not None
        view = memoryview(question)
        try:
            while view:
                view = view[self._started.stdin.write(view) :]
        except BrokenPipeError:
            raise _EndedError(self.end()) from None

    def _line(self) -> bytes:
        assert self._started is not None
        assert self._started.stdout is not None
        while b"\n" not in self._read[-1]:
            ready, _, _ = select.select([self._started.stdout], [], [], WAIT)
            piece = self._started.stdout.read(1 << 20) if ready else b""
            if not piece:
                raise _EndedError(self.end())
            self._read.append(piece)
        line, _, rest = b"".join(self._read).partition(b"\n")
        self._read = [rest]
        return line

    def end(self) -> str:
        """End the process; returns what ended it."""
        process, self._started, self._read = self._started, None, [b""]
        if process is None or self._owner != os.getpid():
            return "has ended"
        why = ""
        try:
            code = process.wait(0.2)  # it may be on its way out
        except subprocess.TimeoutExpired:
            process.kill()
            code, why = process.wait(), f"gives no text within {WAIT:g} s"
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        if code == -signal.SIGPROF:
            return f"takes over {sandbox.SECONDS:g} s of processor time"
        return why or f"ends the process that renders it ({code})"


class _EndedError(Exception):
    """The process is gone; the text says why."""


_processes: dict[int, _Process] = {}  # a forked process must not share its parent's pipe


def _process() -> _Process:
    found = _processes.get(os.getpid())
    if found is None:
        found = _processes.setdefault(os.getpid(), _Process())
        atexit.register(found.end)
    return found
