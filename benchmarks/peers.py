"""Other ways to keep an array of rows on disk, each written and read as its own documentation does for single rows.

No side verifies checksums but ours. Those that need a package outside this project's dependencies name it and are
skipped where it is missing. Two sides with one `write` read the same files in two documented ways.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.rows import BLOCK, ROW_BYTES, SHAPE, Epoch, Side, blocks, filling

PART_ROWS = 512  # rows of a safetensors file or an Arrow record batch, which are built in memory before they are written
NPY_HEADER = 128  # bytes before the data of a small array's .npy


def hdf5(folder: Path, count: int) -> None:
    """h5py's default layout for a known shape: contiguous."""
    with h5py.File(folder / "rows.h5", "w") as file:
        dataset = file.create_dataset("features", (count, *SHAPE), np.float16)
        for number, block in enumerate(blocks(0, count)):
            dataset[number * BLOCK : number * BLOCK + len(block)] = block


@contextmanager
def h5py_rows(folder: Path) -> Iterator[Epoch]:
    with h5py.File(folder / "rows.h5", "r") as file:
        dataset = file["features"]

        def read(rows: np.ndarray, out: np.ndarray) -> None:
            for i, row in enumerate(rows.tolist()):
                out[i] = dataset[row]

        yield filling(read)


def npy(folder: Path, count: int) -> None:
    array = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (count, *SHAPE))
    for number, block in enumerate(blocks(0, count)):
        array[number * BLOCK : number * BLOCK + len(block)] = block
    array.flush()


@contextmanager
def npy_memmap(folder: Path) -> Iterator[Epoch]:
    array = np.load(folder / "rows.npy", mmap_mode="r")

    def read(rows: np.ndarray, out: np.ndarray) -> None:
        np.take(array, rows, 0, out=out, mode="clip")  # the default mode would fill a buffer of its own first

    yield filling(read)


def safetensors(folder: Path, count: int) -> None:
    for number, part in enumerate(_parts(count)):
        save_file({"features": part}, folder / f"rows-{number:05d}.safetensors")


def _parts(count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, PART_ROWS):
        yield np.concatenate(list(blocks(start, min(start + PART_ROWS, count))))


@contextmanager
def safetensors_slices(folder: Path) -> Iterator[Epoch]:
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "np")) for path in sorted(folder.iterdir())]
        slices = [file.get_slice("features") for file in files]

        def read(rows: np.ndarray, out: np.ndarray) -> None:
            for i, row in enumerate(rows.tolist()):
                out[i] = slices[row // PART_ROWS][row % PART_ROWS]

        yield filling(read)


def arrow(folder: Path, count: int) -> None:
    """An Arrow stream of record batches, the file that `datasets` itself writes and maps."""
    kind = pa.list_(pa.float16(), SHAPE[0] * SHAPE[1])
    schema = pa.schema([("features", kind)])
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for part in _parts(count):
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), type=kind)
            writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))


@contextmanager
def arrow_memory_map(folder: Path) -> Iterator[Epoch]:
    """Views of the mapped file as NumPy arrays, without a copy; `Table.take` would be 40 times slower."""
    with pa.memory_map(str(folder / "rows.arrow")) as source:
        chunks = pa.ipc.open_stream(source).read_all().column("features").chunks
        views = [chunk.flatten().to_numpy().reshape(-1, *SHAPE) for chunk in chunks]

        def read(rows: np.ndarray, out: np.ndarray) -> None:
            for i, row in enumerate(rows.tolist()):
                out[i] = views[row // PART_ROWS][row % PART_ROWS]

        yield filling(read)


@contextmanager
def hf_datasets(folder: Path) -> Iterator[Epoch]:
    """Hugging Face `datasets` over the mapped Arrow file; without a dtype it would turn float16 into float32."""
    import datasets

    held = datasets.Dataset.from_file(str(folder / "rows.arrow")).with_format("numpy", dtype=np.float16)

    def epoch(batches: Sequence[np.ndarray], _out: np.ndarray) -> Iterator[np.ndarray]:
        for rows in batches:
            yield held[rows]["features"].reshape(-1, *SHAPE)

    yield epoch


def tar(folder: Path, count: int) -> None:
    """A .npy member to each row, named by its number, as WebDataset lays shards out."""
    with tarfile.open(folder / "rows.tar", "w") as archive:
        number = 0
        for block in blocks(0, count):
            for row in block:
                content = io.BytesIO()
                np.save(content, row)
                member = tarfile.TarInfo(f"{number:08d}.npy")
                member.size = content.tell()
                content.seek(0)
                archive.addfile(member, content)
                number += 1
    with tarfile.open(folder / "rows.tar") as archive:
        np.save(folder / "offsets.npy", np.array([member.offset_data for member in archive]))


@contextmanager
def tar_offsets(folder: Path) -> Iterator[Epoch]:
    """A row is one read, at an offset that was indexed when the tar was written."""
    offsets = (np.load(folder / "offsets.npy") + NPY_HEADER).tolist()
    handle = os.open(folder / "rows.tar", os.O_RDONLY)

    def read(rows: np.ndarray, out: np.ndarray) -> None:
        for i, row in enumerate(rows.tolist()):
            os.preadv(handle, [out[i]], offsets[row])

    try:
        yield filling(read)
    finally:
        os.close(handle)


def lmdb(folder: Path, count: int) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=2 * count * ROW_BYTES + 2**24) as held:
        number = 0
        for block in blocks(0, count):
            with held.begin(write=True) as transaction:
                for row in block:
                    transaction.put(number.to_bytes(8, "big"), row.data, append=True)
                    number += 1


@contextmanager
def _lmdb_rows(folder: Path, *, readahead: bool) -> Iterator[Epoch]:
    import lmdb

    with lmdb.open(str(folder), readonly=True, lock=False, readahead=readahead) as held, held.begin(buffers=True) as transaction:

        def read(rows: np.ndarray, out: np.ndarray) -> None:
            for i, row in enumerate(rows.tolist()):
                found: Any = transaction.get(row.to_bytes(8, "big"))
                out[i] = np.frombuffer(found, np.float16).reshape(SHAPE)

        yield filling(read)


def lmdb_random(folder: Path) -> AbstractContextManager[Epoch]:
    """Buffers instead of copies, and no read-ahead: what LMDB's documentation says for random reads of more than memory."""
    return _lmdb_rows(folder, readahead=False)


def lmdb_readahead(folder: Path) -> AbstractContextManager[Epoch]:
    """With the default read-ahead, which serves rows of many pages better."""
    return _lmdb_rows(folder, readahead=True)


def zarr(folder: Path, count: int) -> None:
    """zarr 3, a row a chunk, uncompressed: its fastest layout for whole random rows."""
    import zarr

    array = zarr.create_array(folder / "rows.zarr", shape=(count, *SHAPE), chunks=(1, *SHAPE), dtype="float16", compressors=None)
    for number, block in enumerate(blocks(0, count)):
        array[number * BLOCK : number * BLOCK + len(block)] = block


@contextmanager
def zarr_rows(folder: Path) -> Iterator[Epoch]:
    import zarr

    array = zarr.open_array(folder / "rows.zarr", mode="r")

    def read(rows: np.ndarray, out: np.ndarray) -> None:
        for i, row in enumerate(rows.tolist()):
            out[i] = array[row]

    yield filling(read)


@contextmanager
def zarr_batches(folder: Path) -> Iterator[Epoch]:
    """A batch in one call, whose chunks zarr reads concurrently."""
    import zarr

    array = zarr.open_array(folder / "rows.zarr", mode="r")

    def epoch(batches: Sequence[np.ndarray], _out: np.ndarray) -> Iterator[np.ndarray]:
        for rows in batches:
            yield np.asarray(array.oindex[rows])

    yield epoch


H5PY = Side("h5py, ds[i]", hdf5, h5py_rows)
PEERS = (
    H5PY,
    Side("npy memmap, take", npy, npy_memmap),
    Side("safetensors slices", safetensors, safetensors_slices),
    Side("Arrow memory map", arrow, arrow_memory_map),
    Side("datasets, numpy float16", arrow, hf_datasets, package="datasets"),
    Side("tar with offsets, pread", tar, tar_offsets),
    Side("LMDB, no read-ahead", lmdb, lmdb_random, package="lmdb"),
    Side("LMDB, read-ahead", lmdb, lmdb_readahead, package="lmdb", only_cold=True),
    Side("zarr, row by row", zarr, zarr_rows, package="zarr"),
    Side("zarr, oindex", zarr, zarr_batches, package="zarr", only_cold=True),
)
