"""One shard of the feature store: an HDF5 file that is written once, whole, and never opened for writing again.

    /features      float16 [n, P, Dv]   contiguous, uncompressed: a row is one read at a known offset
                   or uint8 [n, bytes]  int8 codes with their scales (row_format.py), with /channel_mean, /channel_spread
    /image_sha256  uint8   [n, 32]      whose row it is
    /row_xxh3      uint64  [n]          checksum of each row's bytes
    attributes     format, fingerprint, spec (JSON), library versions, relative_error (of rows, against float32)
    last 40 bytes  a seal behind HDF5's end of file: where the rows lie, and a checksum of every byte that is no row

Any HDF5 tool opens it. Equal content gives equal bytes: no times, no names of machines, attributes in a fixed order.
The seal is checked before HDF5 sees the file, because a damaged header can end the process inside its library.
"""

import json
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
import xxhash

from pipeline.core import ARTEFACT, RESOURCE, PipelineError, best_effort, brief, fingerprint, publish, reserve, set_mode, writing
from pipeline.features.store.layout import require_plain
from pipeline.features.store.row_format import RowFormat, row_format_of

FORMAT = 1
SEAL = b"GLANCE01"
AROUND = 1 << 20  # bytes of a shard beside its rows and tables, and more than there are
PAGE = mmap.ALLOCATIONGRANULARITY


def shard_name(print_: str, hashes: np.ndarray) -> str:
    """The file name follows from the content: fingerprint of the encoder and the images' hashes [n, 32]."""
    return f"{xxhash.xxh3_128_hexdigest(print_.encode() + hashes.tobytes())}.h5"


def row_bytes(rows: RowFormat) -> int:
    """Bytes of one stored row."""
    return int(np.prod(rows.shape)) * rows.dtype.itemsize


def _header(path: Path, hashes: np.ndarray, spec: dict[str, Any], rows: RowFormat, notes: dict[str, float]) -> dict[str, int]:
    """Create the file with room for every row; returns the byte offset of each dataset.

    Rows are then written past HDF5: a full disk inside h5py ends the process with a segmentation fault.
    """
    count = len(hashes)
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    attributes = {
        "fingerprint": fingerprint(spec),
        "format": FORMAT,
        "h5py": h5py.version.version,
        "hdf5": h5py.version.hdf5_version,
        "spec": json.dumps(spec, sort_keys=True),
        **notes,
    }
    datasets = [
        ("features", (count, *rows.shape), rows.dtype),
        ("image_sha256", (count, 32), np.dtype("|u1")),
        ("row_xxh3", (count,), np.dtype("<u8")),
    ] + [(name, values.shape, values.dtype) for name, values in sorted(rows.constants.items())]
    offsets = {}
    with h5py.File(path, "w", libver="earliest", locking=False, alignment_threshold=65536, alignment_interval=4096) as file:
        for name, value in sorted(attributes.items()):
            file.attrs[name] = value
        for name, shape, dtype in datasets:
            dataset = file.create_dataset(name, shape, dtype, dcpl=layout)
            offsets[name] = dataset.id.get_offset()
    return offsets


def write_shard(
    path: Path,
    hashes: np.ndarray,
    spec: dict[str, Any],
    rows: RowFormat,
    batches: Iterable[np.ndarray],
    *,
    notes: dict[str, float] | None = None,
) -> None:
    """Write batches [k, *rows.shape] that follow each other to a row an image; the file appears when all are in.

    An image whose hash is zeros when all batches have come turned out bad and has no row; where none is left there is no file.
    `notes` are numbers that a person may want to read in the file's attributes.
    Holds one batch in memory. Raises `PipelineError` when the disk is full (before the first row) or rows are missing.
    """
    with suppress(_NoRowError), publish(path) as temporary:
        done = _fill(temporary, path, hashes, spec, rows, batches, notes or {})
        kept = hashes[hashes.any(1)]
        if done != len(kept):
            raise ValueError(f"{done} rows for {len(kept)} images")
        if not done:
            raise _NoRowError
        if done < len(hashes):
            with publish(temporary) as smaller:
                _fill(smaller, path, kept, spec, rows, _blocks(temporary, done, rows), notes or {})


class _NoRowError(Exception):
    """All images of a shard are bad."""


def _fill(
    file: Path,
    path: Path,
    hashes: np.ndarray,
    spec: dict[str, Any],
    rows: RowFormat,
    batches: Iterable[np.ndarray],
    notes: dict[str, float],
) -> int:
    """Write what will be the shard `path` to `file`; returns the rows that came. With fewer than hashes it is not sealed."""
    size = row_bytes(rows)
    try:
        offsets = _header(file, hashes, spec, rows, notes)
    except (OSError, RuntimeError) as error:  # which of them, depends on where in HDF5 the disk is full
        reason = re.search("error message = '([^']+)'", str(error))
        what = f"cannot be written: {reason[1] if reason else brief(error)}"
        raise PipelineError(what, where=str(path), code=RESOURCE) from None
    sums, done = np.empty(len(hashes), dtype="<u8"), 0
    handle = os.open(file, os.O_WRONLY)
    try:
        with writing(path):
            reserve(handle, max(offsets["features"] + size * len(hashes), os.fstat(handle).st_size), where=path)
        for batch in batches:
            if batch.dtype != rows.dtype or batch.shape[1:] != rows.shape:
                raise ValueError(f"batch is {batch.dtype} {batch.shape}")
            batch = np.ascontiguousarray(batch)
            sums[done : done + len(batch)] = [xxhash.xxh3_64_intdigest(row.data) for row in batch]
            with writing(path):
                _write_all(handle, batch.reshape(-1).view(np.uint8).data, offsets["features"] + size * done)
            done += len(batch)
        if done < len(hashes):
            return done
        with writing(path):
            for name, table in {"image_sha256": hashes, "row_xxh3": sums, **rows.constants}.items():
                _write_all(handle, memoryview(table.tobytes()), offsets[name])
            place = struct.pack("<8sQQ", SEAL, offsets["features"], size * len(hashes))
            _write_all(handle, memoryview(place + _digest(file, place)), os.fstat(handle).st_size)
            set_mode(handle, 0o444, where=path)
    finally:
        os.close(handle)
    return done


def _blocks(file: Path, count: int, rows: RowFormat) -> Iterator[np.ndarray]:
    """The first rows of a file that `_fill` has not sealed, a block at a time."""
    with h5py.File(file, "r", locking=False) as opened:
        offset = opened["features"].id.get_offset()
    for start in range(0, count, 256):
        block, place = min(256, count - start), offset + start * row_bytes(rows)
        yield np.fromfile(file, rows.dtype, block * int(np.prod(rows.shape)), offset=place).reshape(-1, *rows.shape)


def _digest(path: Path, place: bytes) -> bytes:
    """xxh3-128 of every byte of a shard but its rows and this digest; `place` says where the rows lie."""
    _, offset, size = struct.unpack("<8sQQ", place)
    found = xxhash.xxh3_128(place)
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        if end < offset + size:
            raise ValueError("shorter than its rows")
        if end - size > AROUND + size // 8:
            raise ValueError("more around its rows than its tables need")
        tail = end - len(place) - 16 if _has_seal(file, end) else end
        for start, stop in ((0, offset), (offset + size, tail)):
            file.seek(start)
            found.update(file.read(stop - start))
    return found.digest()


def _has_seal(file: BinaryIO, end: int) -> bool:
    file.seek(max(0, end - 40))
    return file.read(8) == SEAL


def check_seal(path: Path) -> None:
    """Raises ValueError unless every byte outside the rows is as it was written."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        if end < 40 or not _has_seal(file, end):
            raise ValueError("not sealed: cut off or overwritten")
        file.seek(end - 40)
        place, digest = file.read(24), file.read(16)
    if _digest(path, place) != digest:
        raise ValueError("its header or tables have changed since they were written")


def _write_all(handle: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


class Shard:
    """A finished shard, open for reading: `hashes` [n, 32], `spec`, `row_format`, and `offset`
    (bytes) where its rows begin in the file.

    `check` is to be asked for every row that is read. Raises `PipelineError` naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_seal(path)
            with h5py.File(path, "r", locking=False) as file:
                require_plain(file, path.stat().st_size)
                features = file["features"]
                self.spec: dict[str, Any] = json.loads(file.attrs["spec"])
                self.fingerprint = str(file.attrs["fingerprint"])
                self.relative_error: float | None = file.attrs.get("relative_error")
                self.hashes = file["image_sha256"][:]
                self._sums = file["row_xxh3"][:]
                constants = {name: file[name][:] for name in file if name.startswith("channel_")}
                self.offset, shape, dtype = features.id.get_offset(), features.shape, features.dtype
            self.row_format = row_format_of(self.spec, constants)
            if dtype != self.row_format.dtype or shape[1:] != self.row_format.shape:
                raise ValueError(f"its rows are {dtype} {shape[1:]}, not what its spec says")
            with path.open("rb") as handle:
                self._map: mmap.mmap | None = None
                with best_effort("map files into memory", path):
                    self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise self._damaged(f"not a readable shard: {brief(error)}") from None
        if self.fingerprint != fingerprint(self.spec) or len(self.hashes) != len(self._sums) or len(self._sums) != shape[0]:
            raise self._damaged("its parts contradict each other")
        if self._map:
            self._map.madvise(mmap.MADV_RANDOM)  # read-around would fetch eight times what a random row needs
        self._bytes = row_bytes(self.row_format)

    def __len__(self) -> int:
        return len(self.hashes)

    def _damaged(self, what: str) -> PipelineError:
        remedy = "delete this file here, in .dvc/features and in DVC's cache, then dvc repro -f extract"
        return PipelineError(what, where=str(self.path), remedy=remedy, code=ARTEFACT)

    def announce(self, row: int, count: int = 1) -> None:
        """Ask the kernel to read rows from disk now; returns at once."""
        if not self._map:
            return
        start = self.offset + row * self._bytes
        aligned = start - start % PAGE
        self._map.madvise(mmap.MADV_WILLNEED, aligned, start + count * self._bytes - aligned)

    def check(self, row: int, stored: np.ndarray) -> None:
        """Raises `PipelineError` naming the image unless `stored` is what was written as this row."""
        if xxhash.xxh3_64_intdigest(stored.data) != int(self._sums[row]):
            raise self._damaged(f"row {row} (image {self.hashes[row].tobytes().hex()[:16]}…) fails its checksum")

    @property
    def stored(self) -> np.ndarray:
        """All rows [n, *rows.shape]: mapped, or read where the file system maps none."""
        if self._map is None:
            return self._block(0, len(self))
        shape, dtype = self.row_format.shape, self.row_format.dtype
        return np.frombuffer(self._map, dtype, len(self) * int(np.prod(shape)), self.offset).reshape(-1, *shape)

    def _block(self, start: int, count: int) -> np.ndarray:
        shape, dtype = self.row_format.shape, self.row_format.dtype
        count, start = count * int(np.prod(shape)), self.offset + start * self._bytes
        return np.fromfile(self.path, dtype, count, offset=start).reshape(-1, *shape)

    def bad_rows(self) -> Iterator[tuple[int, str]]:
        """Every row that is not what was written, with the reason; reads the whole shard, a block at a time."""
        for start in range(0, len(self), 256):
            self.announce(start, min(256, len(self) - start))
            block = self._block(start, min(256, len(self) - start))
            finite = torch.isfinite(self.row_format.decode(torch.from_numpy(block))).flatten(1).all(1)
            for i, row in enumerate(block):
                if xxhash.xxh3_64_intdigest(row.data) != int(self._sums[start + i]):
                    yield start + i, "fails its checksum"
                elif not finite[i]:
                    yield start + i, "not finite"
