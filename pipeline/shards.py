"""One shard of the feature store: an HDF5 file that is written once, whole, and never opened for writing again.

    /features      float16 [n, P, Dv]   contiguous, uncompressed: a row is one read at a known offset
    /image_sha256  uint8   [n, 32]      whose row it is
    /row_xxh3      uint64  [n]          checksum of each row's bytes
    attributes     format, fingerprint, spec (JSON), library versions

Any HDF5 tool opens it. Equal content gives equal bytes: no times, no names of machines, attributes in a fixed order.
"""

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from pipeline.errors import ARTEFACT, PipelineError, brief
from pipeline.files import publish
from pipeline.vision import fingerprint

FORMAT = 1


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
            os.fchmod(handle, 0o444)
        finally:
            os.close(handle)


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
