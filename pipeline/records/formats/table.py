"""Tables as text (CSV, TSV): a header, then a row a record; quoted cells may hold line ends.

Read by the standard library in its strict mode: a stray quote is an error of its rows, where the lenient mode would make
the rest of the file one cell.
"""

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.core import PipelineError, brief
from pipeline.records.formats.lines import read_lines
from pipeline.records.formats.row import MAX_ROW, MAX_VALUES, BadRow, Row, too_many_values
from pipeline.records.images import ImageError
from pipeline.records.record import is_half_surrogate

DELIMITERS = ("\t", ",", ";")
AS_UTF8 = "save the file as UTF-8 (in Excel: CSV UTF-8)"


class _Lines:
    """Decoded lines for `csv`, which pulls as many as a record has; an iterator that survives its own exceptions."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = read_lines(file)
        self.first = self.number = self.offset = 0
        self._fresh = True

    def mark(self) -> None:
        """The next line begins a record."""
        self._fresh = True

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number, offset, line = next(self._lines)
        if self._fresh:
            self.first, self.offset, self._fresh = self.number, offset, False
        if line is None:
            raise ValueError(f"a line longer than {MAX_ROW >> 20} MiB")
        if too_many_values(line):
            raise ValueError(f"more than {MAX_VALUES:,} values in one line")
        return line.decode("utf-8-sig" if offset == 0 else "utf-8", "surrogateescape")


def delimiter_of(header: str) -> str:
    """The delimiter that stands most often in a header; "" when none does."""
    best = max(DELIMITERS, key=header.count)
    return best if best in header else ""


class Table:
    """A CSV or TSV file; a row's key is its offset in bytes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._names: list[str] = []
        self._delimiter = ","

    def names(self) -> list[str]:
        if not self._names:
            with open(self.file, "rb") as file:
                try:
                    header = next((line for line in _Lines(file) if line.strip()), "")
                    self._delimiter = delimiter_of(header) or ","
                    names = next(csv.reader([header], delimiter=self._delimiter, strict=True), [])
                except (csv.Error, ValueError) as error:
                    raise PipelineError(f"the header is broken: {brief(error)}", where=self.file) from None
            if len(set(names)) < len(names):
                raise PipelineError("a column stands twice in the header", where=self.file, remedy="rename one of them")
            self._names = [name.strip() for name in names]
        return self._names

    def rows(self) -> Iterator[Row | BadRow]:
        names, header_seen = self.names(), False
        with open(self.file, "rb") as file:
            lines = _Lines(file)
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            while True:
                lines.mark()
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except (csv.Error, ValueError) as error:
                    span = f" (lines {lines.first} to {lines.number})" if lines.number > lines.first else ""
                    yield BadRow(self.file, lines.first, f"broken quotes or cells{span}: {brief(error)}")
                    continue
                if not cells or (len(cells) == 1 and not cells[0].strip()):
                    continue
                if not header_seen:
                    header_seen = True
                elif any(map(is_half_surrogate, cells)):  # a byte that is no UTF-8
                    yield BadRow(self.file, lines.first, "not UTF-8", AS_UTF8)
                elif len(cells) != len(names):
                    yield BadRow(self.file, lines.first, f"{len(cells)} cells, the header has {len(names)}")
                else:
                    yield Row(self.file, lines.first, dict(zip(names, cells, strict=True)), lines.offset)

    def content(self, key: int) -> dict[str, Any]:
        names = self.names()
        with open(self.file, "rb") as file:
            file.seek(key)
            try:
                cells = next(csv.reader(_Lines(file), delimiter=self._delimiter, strict=True), [])
            except (csv.Error, ValueError):
                cells = []
        if len(cells) != len(names):
            where = f"{self.file}: byte {key}"
            raise ImageError("no row begins here any more", where=where, remedy="run the stage again")
        return dict(zip(names, cells, strict=True))
