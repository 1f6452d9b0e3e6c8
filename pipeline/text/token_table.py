"""Tokenised conversations on disk: an Arrow file a data set, a row a conversation, read through a memory map.

    ids          list<int32>           token ids, P placeholders an image
    spans        list<int32>           supervised (start, end) pairs, flattened
    image_start  list<int32>           where each image's placeholders begin
    image_sha256 list<binary(32)>      which image stands there
    image_name   list<string>          its name within the image root (for the live encoder)
    where        string                file and line the row came from

The schema's metadata says which tokenizer, template and P made it. Nothing here is ever truncated or shuffled. The folder's
`checksums.json` lists the file, and nothing of it is looked at before every byte is as it was written.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import ARTEFACT, PipelineError, brief, map_arrow, publish, record, verify, writing
from pipeline.text.spread import spread_rows

REMEDY = "dvc repro -f -s tokenize"

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),
        ("image_start", pa.list_(pa.int32())),
        ("image_sha256", pa.list_(pa.binary(32))),
        ("image_name", pa.list_(pa.string())),
        ("where", pa.string()),
    ]
)


def write_tokens(path: Path, batches: Iterable[pa.RecordBatch], spec: dict[str, Any]) -> None:
    """Stream record batches of `SCHEMA` to one Arrow file, which appears whole or not at all."""
    schema = SCHEMA.with_metadata({"spec": json.dumps(spec, sort_keys=True)})
    with publish(path) as temporary, _arrow_writer(path, temporary, schema) as write:
        for batch in batches:
            write(batch.replace_schema_metadata(schema.metadata))
    with writing(path):
        record(path)


@contextmanager
def _arrow_writer(path: Path, temporary: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Yields what writes a batch; only what writing itself raises is told as `path` that cannot be written."""
    with ExitStack() as opened:
        with writing(path):
            sink = opened.enter_context(pa.OSFile(str(temporary), "wb"))
            writer = pa.ipc.new_file(sink, schema)

        def write(batch: pa.RecordBatch) -> None:
            with writing(path):
                writer.write_batch(batch)

        yield write
        with writing(path):
            writer.close()
            sink.close()


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation: `ids` int32 [T], `spans` int32 [answers, 2] (supervised from, to before), `image_start` int32 [k].

    `slots`: its images' numbers among those of all rows.
    """

    ids: np.ndarray
    spans: np.ndarray
    image_start: np.ndarray
    slots: range


class TokenTable:
    """Random access to a token file without loading it.

    Args:
        limit: so many of its rows, in their order (see `spread_rows`); 0 = all.

    Attributes:
        lengths: int32 [N], tokens a row.
        supervised: int64 [N], supervised tokens a row.
        spec: what made the ids (see `PromptBuilder.spec`).
        slots: number of image slots in all rows; a slot's number is its place among them.
        digest: xxh3-128 of the file's bytes.

    Raises `PipelineError` when the file or a list beside it is missing or damaged, or its rows contradict their spans.
    """

    def __init__(self, path: str | Path, *, limit: int = 0) -> None:
        self.path = Path(path)
        self.digest = self._verified()
        try:
            with map_arrow(path) as source:
                reader = pa.ipc.open_file(source)
                self.spec: dict[str, Any] = json.loads(reader.schema.metadata[b"spec"])
                table = reader.read_all()
            if limit and limit < len(table):
                table = table.take(pa.array(spread_rows(table["image_sha256"], limit)))
            self._batches = table.to_batches()
            for batch in self._batches:
                batch.validate(full=True)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise PipelineError(
                f"not a readable token table: {brief(error)}", where=str(path), remedy="dvc repro tokenize", code=ARTEFACT
            ) from None
        self._first_row = np.cumsum([0, *(len(batch) for batch in self._batches)])
        self._columns = [[_lists(batch.column(name)) for name in ("ids", "spans", "image_start")] for batch in self._batches]
        counts = [np.diff(columns[2][0]) for columns in self._columns]
        self._first_slot = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
        self.slots = int(self._first_slot[-1])
        self.lengths = self._concatenate([np.diff(columns[0][0]) for columns in self._columns]).astype(np.int32)
        self.supervised = self._count_supervised()

    def _verified(self) -> str:
        """The file's checksum, once it and the lists beside it are known to be whole; other tables are their readers' matter."""
        if not self.path.exists():
            raise PipelineError("no token table", where=str(self.path), remedy="dvc repro tokenize", code=ARTEFACT)

        def wanted(name: str) -> bool:
            return name == self.path.name or not name.endswith(self.path.suffix)

        found = verify(self.path.parent, remedy=REMEDY, wanted=wanted)
        if self.path.name not in found:
            raise PipelineError(
                "is not one of the files that were written here", where=str(self.path), remedy=REMEDY, code=ARTEFACT
            )
        return found[self.path.name]

    def __len__(self) -> int:
        return int(self._first_row[-1])

    @staticmethod
    def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _count_supervised(self) -> np.ndarray:
        found = []
        for _, (offsets, values), _ in self._columns:
            spans = values[offsets[0] : offsets[-1]].reshape(-1, 2)
            running = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
            found.append(np.diff(running[(offsets - offsets[0]) // 2]))
        supervised = self._concatenate(found)
        if len(supervised) and supervised.min() < 1:
            row = int(np.argmin(supervised))
            raise PipelineError(
                f"row {row} has no supervised token", where=str(self.path), remedy="dvc repro -f tokenize", code=ARTEFACT
            )
        return supervised

    def row(self, number: int) -> Row:
        """One row as views into the file."""
        part = int(np.searchsorted(self._first_row, number, side="right")) - 1
        at = number - int(self._first_row[part])
        ids, spans, starts = (values[offsets[at] : offsets[at + 1]] for offsets, values in self._columns[part])
        return Row(ids, spans.reshape(-1, 2), starts, range(int(self._first_slot[number]), int(self._first_slot[number + 1])))

    def spread(self, count: int) -> np.ndarray:
        """So many of the rows that show pictures, of all where none does: over the table and its pictures, always the same."""
        images = pa.chunked_array([batch.column("image_sha256") for batch in self._batches], SCHEMA.field("image_sha256").type)
        shown = np.flatnonzero(pc.list_value_length(images).to_numpy() > 0)
        rows = shown if len(shown) else np.arange(len(self))
        return rows[spread_rows(images.take(pa.array(rows)), count)]

    def parts(self) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], ...]]:
        """The file's pieces in order: ids, spans and image starts, each as offsets [n + 1] and flat values."""
        return iter([tuple(columns) for columns in self._columns])

    def where(self, number: int) -> str:
        """The file and line a row came from."""
        part = int(np.searchsorted(self._first_row, number, side="right")) - 1
        return self._batches[part].column("where")[number - int(self._first_row[part])].as_py()

    def image_hashes(self) -> np.ndarray:
        """uint8 [slots, 32]: which image stands in each slot."""
        parts = [batch.column("image_sha256").flatten() for batch in self._batches]
        found = [
            np.frombuffer(part.buffers()[1], np.uint8)[part.offset * 32 : (part.offset + len(part)) * 32]
            for part in parts
            if len(part)
        ]
        return np.concatenate([np.empty(0, np.uint8), *found]).reshape(-1, 32)

    def image_names(self) -> pa.ChunkedArray:
        """string [slots]: the image file's name in each slot."""
        return pa.chunked_array([batch.column("image_name").flatten() for batch in self._batches], pa.string())


def _lists(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [n + 1] and flat values of a list column, both without a copy."""
    return column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)
