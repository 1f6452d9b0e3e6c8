"""A section of the benchmark in a process of its own: what it finds is taken as it comes, and its time has a hard end.

A section that fails or does not end in time leaves what it had found and an `error`; others go on. All its processes go with
it. It is forked, so that libraries are imported once: whoever forks must never have asked the card anything.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import RESOURCE, PipelineError, brief
from pipeline.core.quiet import quiet_libraries

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """What every section is given.

    Attributes:
        folder: temporary files, shared by the sections of a run: a later one finds what an earlier one has made.
        tiny: two-layer models and a few pictures, on any device: does it work?
        ends: when it will be stopped, by `time.monotonic`.
    """

    folder: Path
    tiny: bool
    ends: float

    @property
    def device(self) -> torch.device:
        """The card; a CPU in a tiny run without one. Raises `PipelineError` where there is none."""
        if torch.cuda.is_available():
            return torch.device("cuda")
        if self.tiny:
            return torch.device("cpu")
        raise PipelineError("this machine has no GPU", remedy="python -m benchmarks.gpu --tiny", code=RESOURCE)

    @property
    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self.ends - time.monotonic()


Section = Callable[[Setting], Iterator[Figures]]  # yields figures as soon as it has some; later ones are merged into them


def run_section(section: Section, folder: Path, *, tiny: bool, cap: float) -> Figures:
    """All that a section found within `cap` seconds, with `seconds` and, where it did not come to its end, `error`."""
    began = time.monotonic()
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(section, Setting(folder, tiny, began + cap), send))
    process.start()
    send.close()
    found: Figures = {}
    try:
        _gather(receive, found, began + cap)
    finally:
        _end(process)
    if found.pop("done", None) is None and "error" not in found:
        late = time.monotonic() - began >= cap
        found["error"] = f"stopped after {cap:.0f} s" if late else f"its process ended with {process.exitcode}"
    told = json.dumps(found | {"seconds": round(time.monotonic() - began, 1)})
    return json.loads(told.replace(str(folder), "FOLDER"))  # errors name files: no machine's paths


def _gather(receive: Connection, found: Figures, ends: float) -> None:
    while receive.poll(max(0.0, ends - time.monotonic())):
        try:
            merge(found, receive.recv())
        except EOFError:
            return
        if {"done", "error"} & found.keys():
            return


def merge(found: Figures, more: Figures) -> None:
    """Put figures into those that are there, tables of them key by key."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            merge(found[key], value)
        else:
            found[key] = value


def _end(process: BaseProcess) -> None:
    """Kill the section's process and all that it has started."""
    assert process.pid  # it was started
    with suppress(ProcessLookupError):  # it may be gone, or not yet lead a group of its own
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _work(section: Section, setting: Setting, send: Connection) -> None:
    os.setsid()
    os.dup2(2, 1)  # what the pipeline prints is none of the lines that the benchmark answers with
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.folder / "compiled")  # of this run: nothing is compiled beforehand
    quiet_libraries()
    if setting.tiny:
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine would cost it its time
    try:
        for figures in section(setting):
            send.send(figures)
        send.send({"done": True})
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        send.send({"error": f"{type(error).__name__}: {brief(error)}"})


def guarded(name: str, work: Callable[[], Figures]) -> Figures:
    """`{name: what work finds}`, or its error in that place: one row that fails does not cost the others."""
    try:
        return {name: work()}
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {name: {"error": f"{type(error).__name__}: {brief(error)}"}}
