"""Random rows that are not in memory: every turn drops the page cache, and every reader works in a process of its own.

A mapped page survives a dropped cache, so a reader of an earlier turn must be gone, not merely closed; what is still in
memory when a turn begins is counted, and a turn that would read memory is refused.
"""

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.rows import ROW_BYTES, SHAPE, Side, make_rows, require_rows
from pipeline.core.errors import RESOURCE, PipelineError

BATCH = 64
IN_MEMORY = 0.2  # of a side's bytes, at most, when its turn begins: opening Arrow reads ahead of every record batch's header
DROP = Path("/proc/sys/vm/drop_caches")


def drop_cache(folder: Path) -> None:
    """Forget what the kernel holds of the files below `folder`: all caches where we may, else these files' pages."""
    os.sync()
    try:
        DROP.write_text("1\n", encoding="ascii")
    except OSError:
        for path in _files(folder):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def share_in_memory(folder: Path) -> float:
    """Share of the pages of the files below `folder` that are in the page cache (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    held = pages = 0
    for path in _files(folder):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            found = np.empty(-(-len(view) // mmap.PAGESIZE), np.uint8)
            failed = libc.mincore(view.ctypes.data, len(view), found.ctypes.data)
            del view  # or the map cannot be closed
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
        held, pages = held + int((found & 1).sum()), pages + len(found)
    return held / max(1, pages)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def bytes_from_disk() -> int:
    """Bytes this process has made the kernel fetch from block devices, read-ahead included (proc(5))."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, done in a forked process that is gone afterwards, with all it had mapped."""
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, send), daemon=True)
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        process.join()
        raise PipelineError(f"a reader ended with exit code {process.exitcode}", code=RESOURCE) from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _answer(work: Callable[[], Any], send: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent tells the user
        signal.signal(number, signal.SIG_DFL)
    try:
        send.send(work())
    except Exception as error:
        send.send(error)


def plan(count: int, rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Batches to read before the clock starts, and a random eighth of the other rows, of `count` rows.

    The first are the last rows of the files, so that no read-ahead for them brings in many of the second.
    """
    first = max(BATCH, count // 32 // BATCH * BATCH)
    picked = rng.permutation(count - first)[: max(BATCH, count // 8 // BATCH * BATCH)]
    return (
        list(rng.permutation(np.arange(count - first, count)).reshape(-1, BATCH)),
        list(picked.reshape(-1, BATCH)),
    )


def check(side: Side, root: Path, batches: Sequence[np.ndarray]) -> None:
    """Read batches cold and compare every row; raises `PipelineError` naming one that differs."""
    drop_cache(side.folder(root))
    with side.open(side.folder(root)) as epoch:
        for rows, got in zip(batches, epoch(batches, np.empty((BATCH, *SHAPE), np.float16)), strict=True):
            require_rows(side, rows, got, make_rows(rows))


def read_cold(side: Side, root: Path, first: Sequence[np.ndarray], batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """Rows a second of `batches`, and bytes fetched from disk over bytes wanted.

    Opening the files and reading `first` are not timed: a reader's memory is touched and its threads run. Raises
    `PipelineError` when the rows are in memory already.
    """
    folder, out = side.folder(root), np.ones((BATCH, *SHAPE), np.float16)
    drop_cache(folder)
    with side.open(folder) as epoch:
        for _ in epoch(first, out):
            pass
        warm = share_in_memory(folder)
        if warm > IN_MEMORY:
            raise PipelineError(
                f"{warm:.0%} of the rows are still in memory",
                where=side.name,
                remedy="--folder on a disk that is not memory; end what else reads them",
                code=RESOURCE,
            )
        before, began = bytes_from_disk(), perf_counter()
        for _ in epoch(batches, out):
            pass
        spent, fetched = perf_counter() - began, bytes_from_disk() - before
    rows = sum(len(batch) for batch in batches)
    return rows / spent, fetched / (rows * side.row_bytes)


def measure_cold(
    sides: Sequence[Side], root: Path, count: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Bytes of features a second and read amplification of each side in each round, the sides in random order."""
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    amplification: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        first, batches = plan(count, rng)
        for number in rng.permutation(len(sides)):
            side = sides[number]
            if turn == 0:
                in_child(partial(check, side, root, batches))
                continue
            rate, more = in_child(partial(read_cold, side, root, first, batches))
            rates[side.name].append(rate * ROW_BYTES)
            amplification[side.name].append(more)
    return rates, amplification
