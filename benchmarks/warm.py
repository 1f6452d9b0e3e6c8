"""Random rows that are in memory: how near each reader comes to copying that much memory.

Each reader lives in a process of its own, as it does in use: page tables, open files and memory of one must not slow
another down. Only one of them works at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks.cold import bytes_from_disk
from benchmarks.rows import ROW_BYTES, SHAPE, Epoch, Side, make_rows, require_rows
from pipeline.core.errors import RESOURCE, PipelineError
from pipeline.features.store.buffers import page_aligned

BATCHES, HEADLINE = (16, 64, 256), 64
READ_AHEAD = 2**24  # bytes a turn that the kernel may still fetch behind the rows, libraries' code included
MEMCPY, MEMCPY_ROWS = "memcpy, batch by batch", "memcpy, row by row"


def memcpy(data: np.ndarray) -> Epoch:
    """The limit: as many rows as are asked for, lying together in memory, copied in one go."""

    def epoch(batches: Sequence[np.ndarray], out: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        for rows in batches:
            np.copyto(out[: len(rows)], data[start : start + len(rows)])
            start += len(rows)
            yield out[: len(rows)]

    return epoch


def memcpy_rows(data: np.ndarray) -> Epoch:
    """The same a row at a time, which some machines do faster: the source of a row still fits a cache."""

    def epoch(batches: Sequence[np.ndarray], out: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        for rows in batches:
            for i in range(len(rows)):
                np.copyto(out[i], data[start + i])
            start += len(rows)
            yield out[: len(rows)]

    return epoch


def measure_warm(sides: Sequence[Side], root: Path, count: int, rounds: int) -> dict[int, dict[str, list[float]]]:
    """Bytes of features a second by batch size, side and round over the first `count` rows, the sides in random order.

    An untimed round at each batch size brings the rows into memory and compares every one; the headline's size has all
    `rounds`, the others half. `count` is a multiple of every batch size. Raises `PipelineError` when a row differs, or when
    the rows do not stay in memory.
    """
    rng = np.random.default_rng(0)
    opened: dict[str, tuple[Side | None, Callable[[], AbstractContextManager[Epoch]]]] = {
        side.name: (side, partial(side.open, side.folder(root))) for side in sides
    }
    opened |= {MEMCPY: (None, partial(_limit, memcpy, count)), MEMCPY_ROWS: (None, partial(_limit, memcpy_rows, count))}
    with ExitStack() as stack:
        readers = {name: stack.enter_context(_reader(*how)) for name, how in opened.items()}
        found = {}
        for batch in BATCHES:
            for ask in readers.values():
                ask(_shuffled(rng, count, batch), True)
            turns = rounds if batch == HEADLINE else -(-rounds // 2)
            found[batch] = _take_turns(readers, turns, partial(_shuffled, rng, count, batch), rng)
    return found


@contextmanager
def _limit(copy: Callable[[np.ndarray], Epoch], count: int) -> Iterator[Epoch]:
    data = page_aligned((count, *SHAPE), np.dtype(np.float16))
    np.copyto(data, make_rows(range(count)))
    yield copy(data)


def _shuffled(rng: np.random.Generator, count: int, batch: int) -> list[np.ndarray]:
    return list(rng.permutation(count).reshape(-1, batch))


Ask = Callable[[list[np.ndarray], bool], tuple[float, int]]


@contextmanager
def _reader(side: Side | None, open_: Callable[[], AbstractContextManager[Epoch]]) -> Iterator[Ask]:
    """A process that has a side open: batches in, seconds and bytes from disk out."""
    context = get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side, open_), daemon=True)
    process.start()
    there.close()

    def ask(batches: list[np.ndarray], compare: bool) -> tuple[float, int]:
        try:
            here.send((batches, compare))
            answer = here.recv()
        except (EOFError, OSError):
            process.join()
            raise PipelineError(f"a reader ended with exit code {process.exitcode}", code=RESOURCE) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    try:
        yield ask
    finally:
        process.kill()
        process.join()


def _serve(there: Connection, side: Side | None, open_: Callable[[], AbstractContextManager[Epoch]]) -> None:
    torch.set_num_threads(1)
    try:
        with open_() as epoch:
            out: dict[int, np.ndarray] = {}
            while True:
                batches, compare = there.recv()
                room = out.setdefault(len(batches[0]), _buffer(len(batches[0])))
                there.send(_epoch(epoch, batches, room, side if compare else None))
    except EOFError:
        return
    except Exception as error:
        there.send(error)


def _buffer(rows: int) -> np.ndarray:
    """What every side may fill: its pages are there already, and it begins at one, as pinned memory does."""
    out = page_aligned((rows, *SHAPE), np.dtype(np.float16))
    out.fill(1)
    return out


def _epoch(epoch: Epoch, batches: list[np.ndarray], out: np.ndarray, compared: Side | None) -> tuple[float, int]:
    before, began = bytes_from_disk(), perf_counter()
    for rows, got in zip(batches, epoch(batches, out), strict=True):
        if compared:
            require_rows(compared, rows, got, make_rows(rows))
    return perf_counter() - began, bytes_from_disk() - before


def _take_turns(
    readers: dict[str, Ask], rounds: int, batches_of: Callable[[], list[np.ndarray]], rng: np.random.Generator
) -> dict[str, list[float]]:
    names = list(readers)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        batches = batches_of()
        wanted = sum(map(len, batches)) * ROW_BYTES
        for number in rng.permutation(len(names)):
            seconds, fetched = readers[names[number]](batches, False)
            found[names[number]].append(wanted / seconds)
            if fetched > READ_AHEAD + 0.02 * wanted:
                raise PipelineError("the rows did not stay in memory", where=names[number], remedy="fewer --rows", code=RESOURCE)
    return found
