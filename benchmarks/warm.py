"""Random rows that are in memory: how near each reader comes to copying that much memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks.cold import bytes_from_disk
from benchmarks.rows import ROW_BYTES, SHAPE, Epoch, Side, make_rows, require_rows
from pipeline.errors import RESOURCE, PipelineError

BATCHES, HEADLINE = (16, 64, 256), 64
READ_AHEAD = 2**27  # bytes that the kernel may still fetch behind the rows, libraries' code included
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

    Everything is opened once. An untimed round at each batch size brings the rows into memory and compares every one; the
    headline's size has all `rounds`, the others half. `count` is a multiple of every batch size. Raises `PipelineError`
    when a row differs, or when the rows do not stay in memory.
    """
    data, rng = make_rows(range(count)), np.random.default_rng(0)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        epochs = {side.name: stack.enter_context(side.open(side.folder(root))) for side in sides}
        found = {}
        for batch in BATCHES:
            out = np.ones((batch, *SHAPE), np.float16)
            for side in sides:
                batches = _shuffled(rng, count, batch)
                for rows, got in zip(batches, epochs[side.name](batches, out), strict=True):
                    require_rows(side, rows, got, data[rows])
            limits = {MEMCPY: memcpy(data), MEMCPY_ROWS: memcpy_rows(data)}
            turns = rounds if batch == HEADLINE else -(-rounds // 2)
            found[batch] = _take_turns(epochs | limits, out, turns, partial(_shuffled, rng, count, batch), rng)
    return found


def _shuffled(rng: np.random.Generator, count: int, batch: int) -> list[np.ndarray]:
    return list(rng.permutation(count).reshape(-1, batch))


def _take_turns(
    epochs: dict[str, Epoch], out: np.ndarray, rounds: int, batches_of: Callable[[], list[np.ndarray]], rng: np.random.Generator
) -> dict[str, list[float]]:
    names, before = list(epochs), bytes_from_disk()
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        batches = batches_of()
        wanted = sum(map(len, batches)) * ROW_BYTES
        for number in rng.permutation(len(names)):
            began = perf_counter()
            for _ in epochs[names[number]](batches, out):
                pass
            found[names[number]].append(wanted / (perf_counter() - began))
    if bytes_from_disk() - before > READ_AHEAD + 0.02 * rounds * len(names) * wanted:
        raise PipelineError("the rows did not stay in memory", where="warm reads", remedy="fewer --rows", code=RESOURCE)
    return found
