"""What the sides of the store's benchmark share: the rows they keep, and one way to be written, opened, read and checked.

A row is CLIP ViT-B/16's patch features, [196, 768] float16 = 301,056 bytes, and follows from its number alone, so no side
needs the others' files to be checked against.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import ARTEFACT, PipelineError

SHAPE = (196, 768)  # P, Dv
ROW_BYTES = SHAPE[0] * SHAPE[1] * 2
BLOCK = 64  # rows written at a time
FINITE = np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # clears the highest exponent bit of four float16: none is infinite or NaN

# One pass over batches of row numbers int64 [k]: yields their rows float16 [k, P, Dv] in that order. `out`, with room for
# the largest batch, is reused by sides whose library can fill memory that it is given; the others yield their own.
Epoch = Callable[[Sequence[np.ndarray], np.ndarray], Iterator[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Side:
    """One way to keep rows and read them.

    Attributes:
        write: puts that many rows into an empty folder; sides with the same `write` share its files.
        open: opens what was written; nothing stays open or mapped when the context ends.
        package: what must be installed for it.
        row_bytes: a row's size on disk.
        tolerance: largest relative L2 error of a row; 0 asks for the same bits.
        only_cold: with the rows in memory it is no other than, or slower than, another side with its files.
    """

    name: str
    write: Callable[[Path, int], None]
    open: Callable[[Path], AbstractContextManager[Epoch]]
    package: str = ""
    row_bytes: int = ROW_BYTES
    tolerance: float = 0.0
    only_cold: bool = False

    def folder(self, root: Path) -> Path:
        """Where its files are, one level below `root`."""
        return root / self.write.__name__

    def is_installed(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None


def make_rows(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Rows by number, float16 [n, P, Dv]: finite, and noise in every bit, so that nothing below can compress them."""
    bits = np.empty((len(numbers), ROW_BYTES // 8), np.uint64)
    for i, number in enumerate(numbers):
        bits[i] = np.random.default_rng(int(number)).integers(0, 2**64, bits.shape[1], np.uint64)
    bits &= FINITE
    return bits.view(np.float16).reshape(-1, *SHAPE)


def blocks(start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows start..stop in order, 64 at a time."""
    for first in range(start, stop, BLOCK):
        yield make_rows(range(first, min(first + BLOCK, stop)))


def filling(read: Callable[[np.ndarray, np.ndarray], None]) -> Epoch:
    """An epoch of a reader that copies rows [k] into memory [k, P, Dv] it is given."""

    def epoch(batches: Sequence[np.ndarray], out: np.ndarray) -> Iterator[np.ndarray]:
        for rows in batches:
            read(rows, out[: len(rows)])
            yield out[: len(rows)]

    return epoch


def require_rows(side: Side, rows: np.ndarray, got: np.ndarray, expected: np.ndarray) -> None:
    """Raises `PipelineError` unless `got` holds rows [k] as they were written, `expected`, both [k, P, Dv]."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        problem = f"gives {got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
    elif side.tolerance:
        wanted = expected.astype(np.float32).reshape(len(rows), -1)
        error = np.linalg.norm(got.astype(np.float32).reshape(len(rows), -1) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        worst = int(np.argmax(error))
        problem = "" if error[worst] <= side.tolerance else f"row {rows[worst]} is {error[worst]:.1%} off"
    else:
        same = (got.view(np.uint16) == expected.view(np.uint16)).reshape(len(rows), -1).all(1)
        problem = "" if same.all() else f"row {rows[np.argmin(same)]} is not the one that was written"
    if problem:
        raise PipelineError(problem, where=side.name, code=ARTEFACT)
