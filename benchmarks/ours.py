"""This project's store as sides of the benchmark, and the machine's limit for cold reads of the same files.

The store is `pipeline.features.store`, in shards small enough that a batch's rows lie
in several, as they do in any store of more images than one shard holds.
"""

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import torch

from benchmarks.rows import ROW_BYTES, SHAPE, Epoch, Side, blocks
from pipeline.core.checksums import seal
from pipeline.core.errors import RESOURCE, PipelineError, brief
from pipeline.core.files import write_json
from pipeline.core.fingerprint import fingerprint
from pipeline.core.prefetch import prefetch
from pipeline.features.sources import StoredFeatures
from pipeline.features.store.row_format import Float16Format, Int8Format, RowFormat, constants_digest
from pipeline.features.store.shards import row_bytes, shard_name, write_shard
from pipeline.features.store.store import INDEX, FeatureStore
from pipeline.text.token_table import SCHEMA, TokenTable, write_tokens

SHARD_ROWS = 512
THREADS = 2  # runtime.workers
AHEAD = 2  # batches announced before they are read; what run_ahead keeps in work
INT8 = Int8Format(SHAPE[0], np.zeros(SHAPE[1], np.float32), np.ones(SHAPE[1], np.float32))


def store(folder: Path, count: int) -> None:
    """Rows as float16, the default."""
    _write(folder, count, Float16Format(*SHAPE), {})


def store_int8(folder: Path, count: int) -> None:
    """Rows as `vision.storage: int8` keeps them; these rows' channels are alike, so their constants are 0 and 1."""
    _write(folder, count, INT8, {"storage": "int8", "constants": constants_digest(INT8.constants)})


def _write(folder: Path, count: int, rows: RowFormat, storage: dict[str, str]) -> None:
    spec = {**storage, "tokens": SHAPE[0], "width": SHAPE[1]}
    shards = []
    for start in range(0, count, SHARD_ROWS):
        stop = min(start + SHARD_ROWS, count)
        hashes = _hashes(start, stop)
        name = shard_name(fingerprint(spec), hashes)
        encoded = (rows.encode(torch.from_numpy(block)).numpy() for block in blocks(start, stop))
        write_shard(folder / name, hashes, spec, rows, encoded)
        shards.append({"file": name, "rows": stop - start})
    write_json(folder / INDEX, seal({"shards": shards, "spec": spec}))
    _write_table(folder / "tokens.arrow", count)


def _hashes(start: int, stop: int) -> np.ndarray:
    digests = b"".join(hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(start, stop))
    return np.frombuffer(digests, np.uint8).reshape(-1, 32)


def _write_table(path: Path, count: int) -> None:
    """A conversation of one token to each row: image slot i of the table is row i of the store."""
    ones = pa.array([[0]] * count, pa.list_(pa.int32()))
    columns = [
        ones,
        pa.array([[0, 1]] * count, pa.list_(pa.int32())),
        ones,
        pa.array([[bytes(digest)] for digest in _hashes(0, count)], pa.list_(pa.binary(32))),
        pa.array([[str(number)] for number in range(count)]),
        pa.array([str(number) for number in range(count)]),
    ]
    write_tokens(path, [pa.RecordBatch.from_arrays(columns, schema=SCHEMA)], {})


@contextmanager
def read_into(folder: Path) -> Iterator[Epoch]:
    """One thread fills one reused buffer, the next batches announced."""
    held = FeatureStore(folder)

    def epoch(batches: Sequence[np.ndarray], out: np.ndarray) -> Iterator[np.ndarray]:
        for rows in batches[:AHEAD]:
            held.announce(rows)
        for number, rows in enumerate(batches):
            if number + AHEAD < len(batches):
                held.announce(batches[number + AHEAD])
            held.read_into(rows, out[: len(rows)])
            yield out[: len(rows)]

    yield epoch


@contextmanager
def training_loop(folder: Path) -> Iterator[Epoch]:
    """What the training loop waits for: the feature source, run ahead of its consumer."""
    source = StoredFeatures(FeatureStore(folder), TokenTable(folder / "tokens.arrow"))

    def epoch(batches: Sequence[np.ndarray], _out: np.ndarray) -> Iterator[np.ndarray]:
        for loaded in loaded_ahead(source, batches, THREADS):
            yield source.features(loaded).numpy()

    yield epoch


def loaded_ahead(source: StoredFeatures, batches: Sequence[np.ndarray], threads: int) -> Iterator[torch.Tensor]:
    """Batches of slots, announced and read ahead as the training loop has it: rows as they are stored, in host memory."""

    def prepare(rows: np.ndarray) -> np.ndarray:
        source.announce(rows)
        return rows

    announced = prefetch(batches, prepare, depth=threads + 1)
    return (loaded for _, loaded in prefetch((rows for rows, _ in announced), source.load, depth=threads, threads=threads))


@contextmanager
def direct(folder: Path, threads: int = 8, ahead: int = 4) -> Iterator[Epoch]:
    """The limit for cold reads: the same rows of the same files past the page cache, threads fed from one queue.

    `ahead` batches are in the queue, so no thread waits for a batch to end. Raises `PipelineError` where the file system
    has no O_DIRECT for these offsets.
    """
    with ExitStack() as stack:
        places: list[tuple[int, int]] = []
        for entry in FeatureStore(folder).shards:
            with h5py.File(entry.path, "r", locking=False) as file:
                offset = file["features"].id.get_offset()
            try:
                handle = os.open(entry.path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                raise _no_direct(folder, error) from None
            stack.callback(os.close, handle)
            places += [(handle, offset + row * ROW_BYTES) for row in range(len(entry))]
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        buffers: list[np.ndarray] = []

        def fetch(row: int, out: np.ndarray) -> None:
            handle, offset = places[row]
            try:
                if os.preadv(handle, [out.data], offset) != ROW_BYTES:
                    raise OSError(f"row {row} ends early")
            except OSError as error:
                raise _no_direct(folder, error) from None

        def epoch(batches: Sequence[np.ndarray], out: np.ndarray) -> Iterator[np.ndarray]:
            if not buffers or len(buffers[0]) < len(out):  # a mapping is page-aligned, and a row a multiple of 512 bytes
                buffers[:] = [np.frombuffer(mmap.mmap(-1, out.nbytes), np.float16).reshape(out.shape) for _ in range(ahead + 1)]
            waiting: deque[tuple[np.ndarray, list[Future[None]]]] = deque()
            for number, rows in enumerate(batches):
                buffer = buffers[number % len(buffers)][: len(rows)]
                waiting.append((buffer, [pool.submit(fetch, row, buffer[i]) for i, row in enumerate(rows.tolist())]))
                if len(waiting) > ahead:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())

        yield epoch


def _finished(buffer: np.ndarray, reads: list[Future[None]]) -> np.ndarray:
    for read in reads:
        read.result()
    return buffer


def _no_direct(folder: Path, error: OSError) -> PipelineError:
    what = f"cannot be read with O_DIRECT: {brief(error)}"
    return PipelineError(what, where=str(folder), remedy="--folder on a disk whose sectors have 512 bytes", code=RESOURCE)


OURS = Side("ours", store, read_into)
RING = Side("ours, in the training loop", store, training_loop)
DIRECT = Side("O_DIRECT, 8 threads", store, direct, only_cold=True)
OURS_INT8 = Side("ours int8, in the training loop", store_int8, training_loop, row_bytes=row_bytes(INT8), tolerance=0.02)
