"""Processes that decode pictures into memory they share, each watched: one that dies or hangs is replaced and its work done again.

The memory belongs to no file, so a container's small /dev/shm does not matter. A request and its answer are a few bytes in
pipes of the worker's own; before each picture a worker notes which one it is at, so a picture that ends it can be named.
"""

import mmap
import os
import pickle
import selectors
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from pipeline.core import BAD_ROWS, RESOURCE, PipelineError, as_line, end_process, fork_process, patience

AHEAD = 2  # pieces that each worker has under way
TRIES = 3  # times that a piece may end or hang its worker
LOOK = 1.0  # seconds between two looks at workers that say nothing
MEMORY = "lower runtime.workers or runtime.extract_batch"
_LENGTH = struct.Struct("<q")


class Decodable(Protocol):
    """Pictures by number: `decode` gives pixels uint8 of one `shape`, or what is wrong with it."""

    shape: tuple[int, ...]

    def __getitem__(self, item: int) -> tuple[np.ndarray | PipelineError, float]: ...

    def place(self, item: int) -> str:
        """What messages call one picture."""
        ...


@dataclass(slots=True)
class Decoded:
    """A piece of work done: pixels uint8 [k, *shape] of the pictures that could be decoded, each picture's error, seconds.

    The pixels are those of shared memory, and good until the next piece is asked for.
    """

    pixels: np.ndarray
    errors: list[PipelineError | None]
    seconds: float


@dataclass(slots=True)
class _Job:
    numbers: Sequence[int]
    slot: int
    tries: int = 0
    answer: tuple[list[PipelineError | None], float] | PipelineError | None = None


@dataclass(slots=True)
class _Worker:
    process: int
    requests: int  # file descriptors, of the pool's ends
    answers: int
    text: bytearray = field(default_factory=bytearray)  # of an answer that is not whole yet
    jobs: deque[_Job] = field(default_factory=deque)
    step: int = 0
    since: float = field(default_factory=time.monotonic)


class DecoderPool:
    """`workers` processes that decode pieces of at most `piece` pictures. To be closed. Raises `PipelineError` for a picture that
    ends its process, or keeps it for `patience()` seconds, time and again."""

    def __init__(self, images: Decodable, *, piece: int, workers: int) -> None:
        slots = AHEAD * workers + 1
        size = piece * int(np.prod(images.shape))
        self._images, self._count = images, workers
        self._pixels = np.frombuffer(mmap.mmap(-1, slots * size), np.uint8).reshape(slots, piece, *images.shape)
        self._notes = np.frombuffer(mmap.mmap(-1, 16 * workers), np.int64).reshape(workers, 2)  # pictures begun, the last of them
        self._free = list(range(slots))
        self._workers: dict[int, _Worker] = {}
        self._waiting: deque[_Job] = deque()
        self._selector = selectors.DefaultSelector()

    def decode(self, pieces: Iterator[Sequence[int]]) -> Iterator[Decoded]:
        """Each piece (numbers of pictures) decoded, in order; `pieces` is asked for more as workers run out of work."""
        while True:
            self._hand_out(pieces)
            if not self._waiting:
                return
            job = self._waiting.popleft()
            while job.answer is None:
                self._wait()
            if isinstance(job.answer, PipelineError):
                raise job.answer
            errors, seconds = job.answer
            good = sum(error is None for error in errors)
            yield Decoded(self._pixels[job.slot, :good], errors, seconds)
            self._free.append(job.slot)

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for place in list(self._workers):
            self._end(place)
        self._selector.close()

    def _hand_out(self, pieces: Iterator[Sequence[int]]) -> None:
        while self._free:
            place = min(range(self._count), key=lambda at: len(self._workers[at].jobs) if at in self._workers else 0)
            if place in self._workers and len(self._workers[place].jobs) >= AHEAD:
                return
            numbers = next(pieces, None)
            if numbers is None:
                return
            job = _Job(numbers, self._free.pop())
            self._waiting.append(job)
            self._send(place, job)

    def _send(self, place: int, job: _Job) -> None:
        worker = self._workers.get(place) or self._start(place)
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.append(job)
        request = np.array([job.slot, *job.numbers], "<i8").tobytes()
        with suppress(BrokenPipeError):  # it has died: `_wait` will see, and its work be sent again
            _write(worker.requests, request)

    def _start(self, place: int) -> _Worker:
        (theirs_in, requests), (answers, theirs_out) = os.pipe(), os.pipe()
        others = [number for worker in self._workers.values() for number in (worker.requests, worker.answers)]

        def work() -> None:
            for number in (*others, requests, answers):
                os.close(number)
            _work(self._images, theirs_in, theirs_out, self._pixels, self._notes[place])

        process = fork_process(work)
        os.close(theirs_in)
        os.close(theirs_out)
        worker = self._workers[place] = _Worker(process, requests, answers, step=int(self._notes[place, 0]))
        self._selector.register(answers, selectors.EVENT_READ, place)
        return worker

    def _end(self, place: int, *, grace: float = 0.0) -> tuple[deque[_Job], str]:
        """A worker's unfinished work, and how it has ended by itself within `grace` seconds."""
        worker = self._workers.pop(place)
        self._selector.unregister(worker.answers)
        os.close(worker.requests)
        os.close(worker.answers)
        return worker.jobs, end_process(worker.process, grace=grace)

    def _wait(self) -> None:
        """Take up what workers have to say; replace those that have ended, or have been at one picture for too long."""
        for key, _ in self._selector.select(LOOK):
            worker = self._workers[key.data]
            text = os.read(worker.answers, 1 << 20)
            worker.text += text
            if not text:
                self._replace(key.data, hung=False)
            else:
                self._take_answers(worker)
        now, limit = time.monotonic(), patience()
        for place, worker in list(self._workers.items()):
            step = int(self._notes[place, 0])
            if step != worker.step:
                worker.step, worker.since = step, now
            elif worker.jobs and now - worker.since > limit:
                self._replace(place, hung=True)

    def _take_answers(self, worker: _Worker) -> None:
        while len(worker.text) >= _LENGTH.size:
            size = _LENGTH.size + _LENGTH.unpack_from(worker.text)[0]
            if len(worker.text) < size:
                return
            worker.jobs.popleft().answer = pickle.loads(worker.text[_LENGTH.size : size])  # what our own fork has written
            del worker.text[:size]
            worker.since = time.monotonic()

    def _replace(self, place: int, *, hung: bool) -> None:
        began, number = self._notes[place].tolist()
        jobs, ended = self._end(place, grace=0.0 if hung else LOOK)
        if not jobs:
            return  # a new one comes when there is work
        job = jobs[0]
        job.tries += 1
        at = self._images.place(number) if number in job.numbers and began else ""
        what = f"has stood still for {patience():g} s" if hung else f"was ended by {ended}"
        if job.tries >= TRIES:
            raise _given_up(what, at, by_itself=ended not in ("", signal.SIGKILL.name))
        tqdm.write(f"a process that decodes pictures {what}{f' at {at}' if at else ''}: another one goes on", file=sys.stderr)
        for job in jobs:
            self._send(place, job)


def _given_up(what: str, where: str, *, by_itself: bool) -> PipelineError:
    if by_itself:
        return PipelineError(f"the process that decodes it {what}, {TRIES} times", where=where, remedy="remove it", code=BAD_ROWS)
    remedy = f"is memory short, or a disk or network mount gone? {MEMORY}; or remove the picture"
    return PipelineError(f"the process that reads and decodes it {what}, {TRIES} times", where=where, remedy=remedy, code=RESOURCE)


def _work(images: Decodable, requests: int, answers: int, pixels: np.ndarray, notes: np.ndarray) -> None:
    """What a worker does until nobody asks any more."""
    torch.set_num_threads(1)
    while request := _read(requests):
        slot, *numbers = np.frombuffer(request, "<i8").tolist()
        answer: Any
        try:
            answer = _decode(images, numbers, pixels[slot], notes)
        except Exception as error:
            answer = as_line(error, memory=MEMORY)
        _write(answers, pickle.dumps(answer))


def _decode(
    images: Decodable, numbers: Sequence[int], pixels: np.ndarray, notes: np.ndarray
) -> tuple[list[PipelineError | None], float]:
    errors: list[PipelineError | None] = []
    good, total = 0, 0.0
    for number in numbers:
        notes[1] = number
        notes[0] += 1
        found, seconds = images[number]
        total += seconds
        errors.append(found if isinstance(found, PipelineError) else None)
        if not isinstance(found, PipelineError):
            pixels[good] = found
            good += 1
    return errors, total


def _write(handle: int, data: bytes) -> None:
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(handle, view) :]


def _read(handle: int) -> bytes:
    """One message; nothing where there will be none."""
    head = _exactly(handle, _LENGTH.size)
    return _exactly(handle, _LENGTH.unpack(head)[0]) if head else b""


def _exactly(handle: int, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = os.read(handle, size - len(parts))
        if not part:
            return b""
        parts += part
    return parts
