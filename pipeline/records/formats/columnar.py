"""Parquet and Arrow files: MiniMind-V 2026, data sets of the Hugging Face hub, a `datasets` folder saved on disk.

Streams a few rows at a time. Arrow checks little of what it reads, and a damaged file can make it read beyond its memory,
so every batch is validated in full before a value of it is looked at; a batch that fails is taken row by row.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import PipelineError, brief, map_arrow
from pipeline.records.formats import unpacking
from pipeline.records.formats.row import BadRow, Row, too_many_rows
from pipeline.records.formats.unpacking import ERRORS, Refused, is_sound, to_rows, unpacked, why
from pipeline.records.images import ImageError

ROWS = 16  # a step: pictures of a few hundred kilobytes each, so some megabytes at a time
ONE_BY_ONE = 4096  # rows of a damaged block that are tried one by one; each try looks at all of it
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # what closes an Arrow stream; without it rows may be missing unnoticed
_SMALLER = "write the file again, in smaller blocks if they are large"


def _values(batch: pa.RecordBatch, file: str, first: int) -> Iterator[Row | BadRow]:
    """The rows of a record batch, `first` its number in the file; of a damaged one, those that are sound by themselves."""
    sound = is_sound(batch)
    if not sound and batch.num_rows > ONE_BY_ONE:
        yield BadRow(file, first, "a damaged block of rows", "write the file again", rows=batch.num_rows)
        return
    if batch.num_columns and all(map(pa.types.is_null, batch.schema.types)):  # of which a line of text can claim 2^62
        yield BadRow(file, first, "its columns have no values", "write the file again", rows=max(1, batch.num_rows))
        return
    step = min(ROWS, batch.num_rows) if sound else 1
    for at in range(0, batch.num_rows, step):
        part = batch.slice(at, step)
        try:
            if not sound:
                part.validate(full=True)
            contents = to_rows(part)
        except ERRORS as error:
            yield BadRow(file, first + at, why(error), rows=part.num_rows)
            continue
        if contents is None:
            for i in range(part.num_rows):
                yield from _values(part.slice(i, 1), file, first + at + i)
            continue
        for i, content in enumerate(contents):
            yield Row(file, first + at + i, content, first + at + i)


def _one(batch: pa.RecordBatch, at: int, file: str, number: int) -> dict[str, Any]:
    found = next(_values(batch.slice(at, 1), file, number))
    if isinstance(found, BadRow):
        raise ImageError(found.reason, where=found.where)
    return found.content


def _claim(rows: int, size: int) -> str:
    return f"says that it has {rows:,} rows, more than differ in {size:,} bytes"


def _check_names(names: list[str], file: str) -> list[str]:
    if len(set(names)) < len(names):
        raise PipelineError("a column stands twice", where=file, remedy="rename one of them")
    return names


class Parquet:
    """A Parquet file, of which only the columns that are `wanted` are read; a row's key is its number.

    Row groups are streamed page by page, so one that holds the whole file costs no more memory than a small one. A single
    row can only be reached through the rows of its group before it: reading in order is fast, at random it is as fast as
    the groups are small (`python -m pipeline.records repack` makes them so).
    """

    def __init__(self, file: str, wanted: Callable[[str], bool]) -> None:
        self.file, self._wanted = file, wanted
        self._open: tuple[int, pq.ParquetFile] | None = None
        self._place: tuple[int, Iterator[pa.RecordBatch], int, pa.RecordBatch | None] | None = None

    def _parquet(self) -> pq.ParquetFile:
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = (
                    os.getpid(),
                    pq.ParquetFile(self.file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True),
                )
            except ERRORS as error:
                raise PipelineError(f"not a readable Parquet file: {brief(error)}", where=self.file) from None
            self._place = None
        return self._open[1]

    def names(self) -> list[str]:
        try:
            return _check_names(pq.read_schema(self.file).names, self.file)  # not kept open: a data set has thousands of files
        except ERRORS as error:
            raise PipelineError(f"not a readable Parquet file: {brief(error)}", where=self.file) from None

    def _starts(self) -> list[int]:
        metadata = self._parquet().metadata
        starts = list(accumulate((metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)), initial=0))
        if too_many_rows(starts[-1], size := os.path.getsize(self.file)):
            raise PipelineError(_claim(starts[-1], size), where=self.file, remedy="write the file again")
        return starts

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        columns = [name for name in self._parquet().schema_arrow.names if self._wanted(name)]
        batches = self._parquet().iter_batches(batch_size=self._step(group), row_groups=[group], columns=columns, use_threads=False)
        return unpacked(batches)

    def _step(self, group: int) -> int:
        """Rows to read at once, by what its footer says of their size; raises `Refused` for rows that no memory holds."""
        found = self._parquet().metadata.row_group(group)
        chunks = (found.column(i) for i in range(found.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if self._wanted(c.path_in_schema.partition(".")[0]))
        each = size // max(1, found.num_rows)
        if each > unpacking.MAX_BATCH:
            raise Refused(f"rows of {each:,} bytes, more than {unpacking.MAX_BATCH:,}")
        return max(1, min(ROWS, unpacking.MAX_BATCH // max(1, each)))

    def rows(self) -> Iterator[Row | BadRow]:
        starts = self._starts()
        for group, (start, end) in enumerate(pairwise(starts)):
            done = start
            try:
                for batch in self._batches(group):
                    yield from _values(batch, self.file, done)
                    done += batch.num_rows
                    del batch
                problem = f"row group {group} has {done - start:,} rows, the file says {end - start:,}" if done != end else ""
            except ERRORS as error:
                problem = f"row group {group}: {why(error)}"
            if problem:
                remedy = f"{_SMALLER}: the rest of its row group cannot be read"
                yield BadRow(self.file, done, problem, remedy, rows=max(end - done, 0) or 1, ends_file=done > end)
        self._open = self._place = None

    def content(self, key: int) -> dict[str, Any]:
        starts = self._starts()
        group = bisect_right(starts, key) - 1
        if not 0 <= key < starts[-1]:
            raise ImageError("no such row any more", where=f"{self.file}:{key}", remedy="run the stage again")
        try:
            if self._place is None or self._place[0] != group or self._place[2] > key:
                self._place = group, self._batches(group), starts[group], None
            _, batches, first, batch = self._place
            while batch is None or key >= first + batch.num_rows:
                first += batch.num_rows if batch is not None else 0
                batch = next(batches)
                self._place = group, batches, first, batch
            return _one(batch, key - first, self.file, key)
        except (StopIteration, *ERRORS) as error:
            self._place = None
            raise ImageError(f"row group {group}: {why(error)}", where=f"{self.file}:{key}") from None


class Arrow:
    """An Arrow file or stream, memory-mapped; only the columns that are `wanted` are looked at; a row's key is its number.

    Any row is one look-up away: the offsets of the record batches are gathered once, from their headers alone.
    """

    def __init__(self, file: str, wanted: Callable[[str], bool]) -> None:
        self.file, self._wanted = file, wanted
        self._open: tuple[int, pa.NativeFile, Any, list[int], list[int]] | None = None
        self._last: tuple[int, pa.RecordBatch] = -1, None  # a batch found sound: checking costs as much as it has rows

    def _start(self) -> tuple[pa.NativeFile, Any]:
        try:
            mapped = map_arrow(self.file)
            stream = mapped.read(6) != b"ARROW1"
            mapped.seek(0)
            reader = pa.ipc.open_stream(mapped) if stream else pa.ipc.open_file(mapped)
            return mapped, reader
        except ERRORS as error:
            raise PipelineError(f"not a readable Arrow file: {brief(error)}", where=self.file) from None

    def names(self) -> list[str]:
        try:
            schema = self._start()[1].schema
            names, dictionaries = schema.names, [field.name for field in schema if pa.types.is_dictionary(field.type)]
        except ERRORS as error:
            raise PipelineError(f"not a readable Arrow file: {brief(error)}", where=self.file) from None
        if encoded := sorted(filter(self._wanted, dictionaries)):
            raise PipelineError(f"column {encoded[0]} is dictionary-encoded", where=self.file, remedy="save it plain")
        return _check_names(names, self.file)

    def _pick(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.select([name for name in batch.schema.names if self._wanted(name)])

    def rows(self) -> Iterator[Row | BadRow]:
        mapped, reader = self._start()
        stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
        if stream and (mapped.size() < len(_END) or not self._closed(mapped)):
            yield BadRow(self.file, 0, "the file ends early: rows are missing", "save it again", ends_file=True)
            return
        done = 0
        batches = iter(reader) if stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
        try:
            for batch in unpacked(map(self._pick, batches)):
                if too_many_rows(done + batch.num_rows, mapped.size()):
                    yield BadRow(self.file, done, _claim(done + batch.num_rows, mapped.size()), _SMALLER, ends_file=True)
                    return
                yield from _values(batch, self.file, done)
                done += batch.num_rows
                del batch
        except ERRORS as error:
            yield BadRow(self.file, done, why(error), _SMALLER, ends_file=True)

    def _closed(self, mapped: pa.NativeFile) -> bool:
        place = mapped.tell()
        mapped.seek(mapped.size() - len(_END))
        closed = mapped.read(len(_END)) == _END
        mapped.seek(place)
        return bool(closed)

    def _index(self) -> tuple[pa.NativeFile, Any, list[int], list[int]]:
        """The open file, its reader, offset of each record batch (streams only) and first row of each, and the end."""
        if self._open is None or self._open[0] != os.getpid():
            mapped, reader = self._start()
            offsets, counts = [], []
            if isinstance(reader, pa.ipc.RecordBatchStreamReader):
                while True:
                    offset = mapped.tell()
                    try:
                        counts.append(reader.read_next_batch().num_rows)
                    except StopIteration:
                        break
                    offsets.append(offset)
            else:
                counts = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            self._last = -1, None
            self._open = os.getpid(), mapped, reader, offsets, list(accumulate(counts, initial=0))
        return self._open[1:]

    def content(self, key: int) -> dict[str, Any]:
        where = f"{self.file}:{key}"
        try:
            mapped, reader, offsets, starts = self._index()
            number = bisect_right(starts, key) - 1
            if not 0 <= key < starts[-1]:
                raise ImageError("no such row any more", where=where, remedy="run the stage again")
            if number != self._last[0]:
                batch = self._pick(self._batch(mapped, reader, offsets, number))
                if not is_sound(batch):
                    return _one(batch, key - starts[number], self.file, key)
                self._last = number, batch
            return dict(self._last[1].slice(key - starts[number], 1).to_pylist()[0])
        except ERRORS as error:
            raise ImageError(why(error), where=where) from None

    def _batch(self, mapped: pa.NativeFile, reader: Any, offsets: list[int], number: int) -> pa.RecordBatch:
        if not offsets:
            return reader.get_batch(number)
        mapped.seek(offsets[number])
        return pa.ipc.read_record_batch(pa.ipc.read_message(mapped), reader.schema)
