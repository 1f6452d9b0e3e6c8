"""What every reader gives: rows in file order, good or bad, and a row again by its key.

A reader knows one kind of file and nothing of conversations; `conversation` knows those and nothing of files. A bad row is
a value, never an exception, so that whoever reads decides what it costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pipeline.core import PipelineError
from pipeline.records.record import Record

MAX_ROW = 64 << 20  # bytes of one row's text: a file without line ends is one row too long, not an empty memory
MAX_VALUES = 1_000_000  # of one row: each takes dozens of bytes of memory, and two of its text
FEW_ROWS = 1 << 20  # of any file: to look at them takes seconds
MEND = "mend or remove the row"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    `row` is a line (from 1), a row of a table (from 0) or a sample's name; `rows` counts how many it stands for, since a
    damaged block takes its neighbours along. With `ends_file` nothing behind it can be read, so how many are lost is
    unknown: no policy may skip that.
    """

    file: str
    row: int | str
    reason: str
    remedy: str = MEND
    rows: int = 1
    ends_file: bool = False

    @property
    def where(self) -> str:
        return place(self.file, self.row)

    def line(self) -> str:
        """One line: file, row, reason, remedy; control characters removed."""
        return PipelineError(self.reason, where=self.where, remedy=self.remedy).line()


def bad_record(record: Record, reason: str, remedy: str = MEND) -> BadRow:
    """The row of a record that reads well and cannot be used."""
    file, _, row = record.where.rpartition(":")
    return BadRow(file, int(row) if row.isdecimal() else row, reason, remedy or MEND)


class Row(NamedTuple):
    """A row as its file spells it: `content` by key or column; `key` finds it again, None where it cannot be."""

    file: str
    row: int | str
    content: dict[str, Any]
    key: int | None

    @property
    def where(self) -> str:
        return place(self.file, self.row)


class Bytes:
    """Stands in a row for an image's bytes that were left unread."""

    __slots__ = ()


UNREAD = Bytes()


class Reader(Protocol):
    """One file, or one folder, of rows. Cheap to make; opened when first used; used by one thread of one process."""

    @property
    def file(self) -> str:
        """What it reads, as the user named it."""
        ...

    def names(self) -> list[str] | None:
        """The columns, where a file has the same in every row; raises `PipelineError` when it is not such a file."""
        ...

    def rows(self) -> Iterator[Row | BadRow]:
        """Every row once, in order, in constant memory."""
        ...

    def content(self, key: int) -> dict[str, Any]:
        """The content of one row, image bytes included; raises `PipelineError` when there is no such row any more."""
        ...


def too_many_values(text: str | bytes) -> bool:
    """Whether a row's text holds more values than any row has, by the marks between them."""
    if len(text) < 2 * MAX_VALUES:
        return False
    if isinstance(text, str):
        return sum(map(text.count, (",", "[", "{", "\t", ";"))) > MAX_VALUES
    return sum(map(text.count, (b",", b"[", b"{", b"\t", b";"))) > MAX_VALUES


def too_many_rows(rows: int, size: int) -> bool:
    """Whether a file of `size` bytes cannot hold so many rows that differ: each takes a bit at least, however it is packed."""
    return rows > max(FEW_ROWS, 8 * size)


def place(file: str, row: int | str) -> str:
    """`file:row`, as editors jump to it."""
    return f"{file}:{row}"
