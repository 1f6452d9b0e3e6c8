"""Small files that say they are gigabytes: `BOMBS[kind](path, size)`, with a text of `size` bytes that stands once in them."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, MANY = 64, 200_000


def _parquet(path: Path, column: pa.Array, **options: object) -> None:
    table = pa.table({"text": pa.array(["x"] * len(column)), "images": column})
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30, **options)


def _arrow(path: Path, column: pa.Array, codec: str | None = None) -> None:
    batch = pa.record_batch({"text": pa.array(["x"] * len(column)), "images": column})
    with pa.ipc.new_file(path, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as file:
        file.write_batch(batch)


def _repeated(rows: int, size: int) -> pa.DictionaryArray:
    """One text in so many rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * size]))


def _in_one_row(column: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)


def _views(rows: int, size: int) -> pa.Array:
    """A text that so many rows show, each by its length, its first letters, and where it stands."""
    view = struct.pack("<i4sii", size, b"xxxx", 0, 0)
    return pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(view * rows), pa.py_buffer(b"x" * size)])


def _plain(rows: int, size: int) -> pa.Array:
    return pa.array(["x" * size] * rows)


def _pages(path: Path, size: int) -> None:
    """Pages of one value each, all of them in one row."""
    _parquet(path, _in_one_row(_plain(16, size)), use_dictionary=False, data_page_size=1, write_batch_size=1)


def _nothing(path: Path, size: int) -> None:
    """A column that takes no room, of any number of rows."""
    batch = pa.record_batch({"text": pa.nulls(size << 7), "images": pa.nulls(size << 7)})
    with pa.ipc.new_stream(path, batch.schema, options=pa.ipc.IpcWriteOptions(allow_64bit=True)) as file:
        file.write_batch(batch)


BOMBS: dict[str, Callable[[Path, int], None]] = {
    "a text in every row.parquet": lambda path, size: _parquet(path, _repeated(ROWS, size)),
    "a text over and over in one row.parquet": lambda path, size: _parquet(path, _in_one_row(_repeated(MANY, size))),
    "prefixes of one text.parquet": lambda path, size: _parquet(
        path, _in_one_row(_plain(16, size)), use_dictionary=False, column_encoding={"images.list.element": "DELTA_BYTE_ARRAY"}
    ),
    "a row of many pages.parquet": _pages,
    "zeros in one row.parquet": lambda path, size: _parquet(path, _in_one_row(pa.array(np.zeros(size, np.int64)))),
    "a block of zstd.arrow": lambda path, size: _arrow(path, _plain(16, size), "zstd"),
    "a block of lz4.arrow": lambda path, size: _arrow(path, _plain(16, size), "lz4"),
    "views of a text.arrow": lambda path, size: _arrow(path, _views(ROWS, size)),
    "views of a text in one row.arrow": lambda path, size: _arrow(path, _in_one_row(_views(MANY, size))),
    "a text over and over in one row.arrow": lambda path, size: _arrow(path, _in_one_row(_repeated(MANY, size))),
    "nothing in one row.arrow": lambda path, _: _arrow(path, pa.FixedSizeListArray.from_arrays(pa.nulls(1 << 30), 1 << 30)),
    "nothing in every row.arrow": _nothing,
}  # fmt: skip
