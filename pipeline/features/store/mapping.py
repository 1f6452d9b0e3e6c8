"""Rows that lie in many files, mapped into memory as one array, so that a batch is gathered by a single call.

Files are mapped behind each other at addresses a whole number of rows apart. Between them lies address space that nobody
owns, which costs nothing; reading there would end the process, so only numbers that `first` leads to may be asked for.
"""

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from io import FileIO
from math import gcd
from pathlib import Path

import numpy as np

from pipeline.core import best_effort

HUGE = 2**21  # a file whose address is a multiple of this is mapped in large pages where the kernel holds it in such
MOST = 2**45  # bytes of address space; processors have 2**47 and more
MAP_FIXED, PROT_NONE, FAILED = 0x10, 0, ctypes.c_void_p(-1).value


class RowMap:
    """Files whose rows begin at some offset, as one array.

    Attributes:
        rows: dtype [V, *shape], read-only; valid at `first[i]` .. `first[i]` + the i-th file's rows, and nowhere else.
        first: int64 [files].
    """

    def __init__(self, parts: Sequence[tuple[Path, int]], shape: tuple[int, ...], dtype: np.dtype) -> None:
        """`parts`: each file and the offset of its first row, a multiple of the dtype's size. Raises `OSError`.

        Rows of a file that no mapping brings a whole number of rows away from the others' are read into memory: HDF5 puts
        fewer than 64 KiB of them anywhere.
        """
        size = int(np.prod(shape)) * dtype.itemsize
        lengths = [path.stat().st_size for path, _ in parts]
        offsets = [offset for _, offset in parts]
        usual = offsets[int(np.argmax(lengths))]
        loose = [(offset - usual) % gcd(mmap.ALLOCATIONGRANULARITY, size) != 0 for offset in offsets]
        for number in np.flatnonzero(loose).tolist():
            lengths[number] += usual - offsets[number]
            offsets[number] = usual
        places, total = _place(offsets, lengths, size, HUGE)
        if total > MOST:
            places, total = _place(offsets, lengths, size, mmap.ALLOCATIONGRANULARITY)
        start = _mmap(None, total + HUGE, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1)
        weakref.finalize(self, _libc().munmap, start, total + HUGE)
        base = -(-start // HUGE) * HUGE
        for (path, offset), place, length, apart in zip(parts, places, lengths, loose, strict=True):
            with path.open("rb", buffering=0) as file:
                if apart:
                    _read_into(file, offset, base + place, usual, length)
                    continue
                _mmap(base + place, length, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, file.fileno())
            _libc().madvise(base + place, length, mmap.MADV_RANDOM)  # read-around would fetch eight times a row
        zero = places[0] + offsets[0]
        count = (total - zero) // size
        self.first = np.array([(place + offset - zero) // size for place, offset in zip(places, offsets, strict=True)])
        held = (ctypes.c_uint8 * (count * size)).from_address(base + zero)
        self.rows = np.ctypeslib.as_array(held).view(dtype).reshape(count, *shape)
        self.rows.flags.writeable = False

    def take(self, places: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows at `places` [n] into `out` [n, *shape]."""
        np.take(self.rows, places, axis=0, out=out, mode="clip")  # for "raise" it would copy twice


class RowFiles:
    """The same files, read row by row: for file systems that map none."""

    def __init__(self, parts: Sequence[tuple[Path, int]], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._size = int(np.prod(shape)) * dtype.itemsize
        counts = [(path.stat().st_size - offset) // self._size for path, offset in parts]
        self.first = np.cumsum([0, *counts[:-1]])
        self._parts = parts

    def take(self, places: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows at `places` [n] into `out` [n, *shape]; a file that has become shorter is an OSError."""
        owner = np.searchsorted(self.first, places, side="right") - 1
        bytes_ = out.reshape(len(out), -1).view(np.uint8)
        for number in np.unique(owner).tolist():
            path, offset = self._parts[number]
            with path.open("rb", buffering=0) as file:
                for i in np.flatnonzero(owner == number).tolist():
                    file.seek(offset + int(places[i] - self.first[number]) * self._size)
                    if file.readinto(bytes_[i].data) != self._size:
                        raise OSError(errno.EIO, "shorter than its rows", str(path))


def open_rows(parts: Sequence[tuple[Path, int]], shape: tuple[int, ...], dtype: np.dtype) -> RowMap | RowFiles:
    """The files mapped into memory, or opened row by row where the file system maps none."""
    with best_effort("map files into memory", parts[0][0]):
        return RowMap(parts, shape, dtype)
    return RowFiles(parts, shape, dtype)


def _place(offsets: list[int], lengths: list[int], size: int, step: int) -> tuple[list[int], int]:
    """Where each file goes, multiples of `step` such that all rows lie whole rows of `size` apart; and the end of all.

    Where that cannot be with this step, a page's is taken: offsets are multiples of a page, which always can.
    """
    common = gcd(step, size)
    if any((offset - offsets[0]) % common for offset in offsets):
        return _place(offsets, lengths, size, mmap.ALLOCATIONGRANULARITY)
    inverse, end = pow(step // common, -1, size // common), 0
    places: list[int] = []
    for offset, length in zip(offsets, lengths, strict=True):
        place = -(-end // step) * step
        if places:
            away = (places[0] + offsets[0] - offset - place) // common
            place += away * inverse % (size // common) * step
        places.append(place)
        end = place + length
    return places, end


def _read_into(file: FileIO, offset: int, address: int, before: int, length: int) -> None:
    """What a file holds from `offset` on, in memory at `address`, behind `before` bytes that mean nothing."""
    held = _mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON | MAP_FIXED, -1)
    file.seek(offset)
    if file.readinto((ctypes.c_uint8 * (length - before)).from_address(held + before)) != length - before:
        raise OSError(errno.EIO, "shorter than its rows", file.name)


def _mmap(address: int | None, length: int, protection: int, flags: int, handle: int) -> int:
    found = _libc().mmap(address, length, protection, flags, handle, 0)
    if found == FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(found)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
