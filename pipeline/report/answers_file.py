"""predictions.parquet read within bounds: a file that is damaged, or says that it is far more than it is, is one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import ARTEFACT, PipelineError, bounded_memory, brief
from pipeline.records import too_many_rows

ROWS = 4096  # a step
MEMORY = 256 << 20  # bytes that a step may take while it is unpacked; what is made of it takes some times that
ERRORS = (pa.ArrowException, KeyError, ValueError, TypeError, OSError, MemoryError)
TEXT, TEXTS = pa.string(), ("where", "question", "reference", "answer", "blind")
COLUMNS = {**dict.fromkeys(TEXTS, TEXT), "turn": pa.int32(), "images": pa.list_(TEXT), "log_likelihood": pa.list_(pa.float32())}


class AnswersFile:
    """The answers of one stage, in which every value stands that a stage writes.

    Attributes:
        sizes: rows of each row group.

    Raises `PipelineError` for what no stage has written, at any time.
    """

    def __init__(self, file: BinaryIO, *, where: str) -> None:
        self._where = where
        with self._reading():
            size = file.seek(0, 2)
            file.seek(0)
            self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
            metadata = self._file.metadata
            self.sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            if too_many_rows(sum(self.sizes), size):
                raise ValueError(f"{sum(self.sizes):,} rows in {size:,} bytes")
            schema = self._file.schema_arrow
            for name, kind in COLUMNS.items():
                if name not in schema.names or not _alike(schema.field(name).type, kind):
                    raise ValueError(f"no column {name} of {kind}")
            if "exact" not in schema.names or not pa.types.is_floating(schema.field("exact").type):
                raise ValueError("no column exact of numbers")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with bounded_memory(MEMORY):
                yield
        except ERRORS as error:
            what = f"unpacks to more than {MEMORY >> 20} MB at once" if isinstance(error, MemoryError) else brief(error)
            remedy = "dvc checkout, else dvc repro"
            raise PipelineError(f"not a stage's answers: {what}", where=self._where, remedy=remedy, code=ARTEFACT) from None

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """These columns of all rows, some at a time."""
        with self._reading():
            batches = self._file.iter_batches(batch_size=ROWS, columns=columns, use_threads=False)
        while True:
            with self._reading():
                batch = next(batches, None)
                if batch is None:
                    return
                _check(batch)
            yield batch
            del batch

    def rows(self, group: int, inside: np.ndarray) -> list[dict[str, Any]]:
        """Those rows of a row group, in Python."""
        found: list[dict[str, Any]] = []
        first = 0
        with self._reading():
            for batch in self._file.iter_batches(batch_size=ROWS, row_groups=[group], use_threads=False):
                here = inside[(inside >= first) & (inside < first + batch.num_rows)]
                if len(here):
                    _check(batch)
                    found += batch.take(pa.array(here - first)).to_pylist()
                first += batch.num_rows
        if len(found) != len(inside):
            raise PipelineError("not a stage's answers: rows are missing", where=self._where, remedy="dvc repro", code=ARTEFACT)
        return found


def _alike(found: pa.DataType, kind: pa.DataType) -> bool:
    """Whether a column is of a type, whatever its list calls what is in it."""
    if pa.types.is_list(kind):
        return bool(pa.types.is_list(found)) and found.value_type == kind.value_type
    return bool(found == kind)


def _check(batch: pa.RecordBatch) -> None:
    """Raises `ERRORS` for texts that are none, and for a value that is not there."""
    batch.validate(full=True)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        inner = column.flatten() if pa.types.is_list(column.type) else column
        if (name in COLUMNS or name == "exact") and column.null_count + inner.null_count:
            raise ValueError(f"a row has no {name}")
