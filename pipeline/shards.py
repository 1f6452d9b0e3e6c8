"""One shard of the feature store: an HDF5 file that is written once, whole, and never opened for writing again.

    /features      float16 [n, P, Dv]   contiguous, uncompressed: a row is one read at a known offset
    /image_sha256  uint8   [n, 32]      whose row it is
    /row_xxh3      uint64  [n]          checksum of each row's bytes
    attributes     format, fingerprint, spec (JSON), library versions
    last 40 bytes  a seal behind HDF5's end of file: where the rows lie, and a checksum of every byte that is no row

Any HDF5 tool opens it. Equal content gives equal bytes: no times, no names of machines, attributes in a fixed order.
The seal is checked before HDF5 sees the file, because a damaged header can end the process inside its library.
"""

import json
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import xxhash

from pipeline.errors import ARTEFACT, PipelineError, brief
from pipeline.files import publish
from pipeline.vision import fingerprint

FORMAT = 1
SEAL = b"GLANCE01"


def shard_name(print_: str, hashes: np.ndarray) -> str:
    """The file name follows from the content: fingerprint of the encoder and the images' hashes [n, 32]."""
    return f"{xxhash.xxh3_128_hexdigest(print_.encode() + hashes.tobytes())}.h5"


def _header(path: Path, hashes: np.ndarray, spec: dict[str, Any]) -> dict[str, int]:
    """Create the file with room for every row; returns the byte offset of each dataset.

    Rows are then written past HDF5: a full disk inside h5py ends the process with a segmentation fault.
    """
    count, row = len(hashes), (spec["tokens"], spec["width"])
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
    }
    offsets = {}
    with h5py.File(path, "w", libver="earliest", alignment_threshold=65536, alignment_interval=4096) as file:
        for name, value in sorted(attributes.items()):
            file.attrs[name] = value
        for name, shape, dtype in (
            ("features", (count, *row), "<f2"),
            ("image_sha256", (count, 32), "|u1"),
            ("row_xxh3", (count,), "<u8"),
        ):
            dataset = file.create_dataset(name, shape, dtype, dcpl=layout)
            offsets[name] = dataset.id.get_offset()
    return offsets


def write_shard(path: Path, hashes: np.ndarray, spec: dict[str, Any], batches: Iterable[np.ndarray]) -> None:
    """Write float16 batches [k, P, Dv] that follow each other to n rows; the file appears when all are in.

    Holds one batch in memory. Raises `PipelineError` when the disk is full (before the first row) or rows are missing.
    """
    row_bytes = spec["tokens"] * spec["width"] * 2
    with publish(path) as temporary:
        offsets = _header(temporary, hashes, spec)
        sums, done = np.empty(len(hashes), dtype="<u8"), 0
        handle = os.open(temporary, os.O_WRONLY)
        try:
            os.posix_fallocate(handle, 0, max(offsets["features"] + row_bytes * len(hashes), os.fstat(handle).st_size))
            for batch in batches:
                if batch.dtype != np.float16 or batch.shape[1:] != (spec["tokens"], spec["width"]):
                    raise ValueError(f"batch is {batch.dtype} {batch.shape}")
                for row in batch:
                    sums[done] = xxhash.xxh3_64_intdigest(row.tobytes())
                    done += 1
                _write_all(handle, batch.tobytes(), offsets["features"] + row_bytes * (done - len(batch)))
            if done != len(hashes):
                raise ValueError(f"{done} rows for {len(hashes)} images")
            _write_all(handle, hashes.tobytes(), offsets["image_sha256"])
            _write_all(handle, sums.tobytes(), offsets["row_xxh3"])
            place = struct.pack("<8sQQ", SEAL, offsets["features"], row_bytes * len(hashes))
            _write_all(handle, place + _digest(temporary, place), os.fstat(handle).st_size)
            os.fchmod(handle, 0o444)
        finally:
            os.close(handle)


def _digest(path: Path, place: bytes) -> bytes:
    """xxh3-128 of every byte of a shard but its rows and this digest; `place` says where the rows lie."""
    _, offset, size = struct.unpack("<8sQQ", place)
    found = xxhash.xxh3_128(place)
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        if end < offset + size:
            raise ValueError("shorter than its rows")
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


def _write_all(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


class Shard:
    """A finished shard, open for reading: `hashes` [n, 32], `spec`, and rows straight from the page cache.

    Every row's checksum is verified the first time it is read. Raises `PipelineError` naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_seal(path)
            with h5py.File(path, "r", locking=False) as file:
                features = file["features"]
                if features.external is not None or features.is_virtual or features.dtype != np.float16:
                    raise ValueError("not plain float16 rows")
                self.spec: dict[str, Any] = json.loads(file.attrs["spec"])
                self.fingerprint = str(file.attrs["fingerprint"])
                self.hashes = file["image_sha256"][:]
                self._sums = file["row_xxh3"][:]
                offset, shape = features.id.get_offset(), features.shape
            self._rows = np.memmap(path, np.float16, "r", offset, shape)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise self._damaged(f"not a readable shard: {brief(error)}") from None
        if self.fingerprint != fingerprint(self.spec) or len(self.hashes) != len(self._sums) or len(self._sums) != shape[0]:
            raise self._damaged("its parts contradict each other")
        self._verified = np.zeros(len(self.hashes), dtype=bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.hashes)

    def _damaged(self, what: str) -> PipelineError:
        remedy = "delete this file here, in .dvc/features and in DVC's cache, then dvc repro -f extract"
        return PipelineError(what, where=str(self.path), remedy=remedy, code=ARTEFACT)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows [k] into `out` float16 [k, P, Dv]."""
        np.take(self._rows, rows, axis=0, out=out, mode="clip")
        for position in np.flatnonzero(~self._verified[rows]):
            row = int(rows[position])
            if xxhash.xxh3_64_intdigest(out[position].tobytes()) != int(self._sums[row]):
                raise self._damaged(f"row {row} (image {self.hashes[row].tobytes().hex()[:16]}…) fails its checksum")
            self._verified[row] = True

    def bad_rows(self) -> Iterator[tuple[int, str]]:
        """Every row that is not what was written, with the reason; reads the whole shard, a block at a time."""
        for start in range(0, len(self), 256):
            block = np.array(self._rows[start : start + 256])
            finite = np.asarray(np.isfinite(block.reshape(len(block), -1)).all(1))
            for i, row in enumerate(block):
                if xxhash.xxh3_64_intdigest(row.tobytes()) != int(self._sums[start + i]):
                    yield start + i, "fails its checksum"
                elif not finite[i]:
                    yield start + i, "not finite"
