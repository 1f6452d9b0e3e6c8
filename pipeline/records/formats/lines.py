"""JSON lines: one object a line. A line that is broken, too long or not UTF-8 is a bad row; its neighbours are not."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.core import PipelineError, brief
from pipeline.records.formats.row import MAX_ROW, MAX_VALUES, BadRow, Row, too_many_values
from pipeline.records.images import ImageError
from pipeline.records.record import load_json


def read_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Lines as (number from 1, offset in bytes, line); one longer than `MAX_ROW` comes as None, read past in pieces."""
    number = offset = 0
    while line := file.readline(MAX_ROW + 1):
        number, start = number + 1, offset
        offset += len(line)
        if len(line) <= MAX_ROW or line.endswith(b"\n"):
            yield number, start, line
            continue
        while rest := file.readline(1 << 20):
            offset += len(rest)
            if rest.endswith(b"\n"):
                break
        yield number, start, None


def parse_object(text: str, *, where: str) -> dict[str, Any]:
    """A JSON object; raises `PipelineError` naming `where` for anything else."""
    if too_many_values(text):
        raise PipelineError(f"more than {MAX_VALUES:,} values in one row", where=where)
    try:
        content = load_json(text)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"not a JSON object: {brief(error)}", where=where) from None
    if not isinstance(content, dict):
        raise PipelineError(f"expected a JSON object, got {type(content).__name__}", where=where)
    return content


def _text(line: bytes) -> str:
    return line.decode("utf-8-sig" if line.startswith(BOM_UTF8) else "utf-8")  # the first is many times slower


class JsonLines:
    """A file of JSON lines; a row's key is its offset in bytes."""

    def __init__(self, file: str) -> None:
        self.file = file

    def names(self) -> None:
        """Every row has its own keys."""

    def rows(self) -> Iterator[Row | BadRow]:
        with open(self.file, "rb") as file:
            for number, offset, line in read_lines(file):
                if line is None:
                    yield BadRow(self.file, number, f"longer than {MAX_ROW >> 20} MiB")
                elif line.strip():
                    try:
                        yield Row(self.file, number, parse_object(_text(line), where=""), offset)
                    except (PipelineError, UnicodeDecodeError) as error:
                        what = error.what if isinstance(error, PipelineError) else f"not UTF-8: {brief(error)}"
                        yield BadRow(self.file, number, what)

    def content(self, key: int) -> dict[str, Any]:
        where = f"{self.file}: byte {key}"
        with open(self.file, "rb") as file:
            file.seek(key)
            try:
                return parse_object(_text(file.readline(MAX_ROW + 1)), where=where)
            except (PipelineError, UnicodeDecodeError):
                raise ImageError("no row begins here any more", where=where, remedy="run the stage again") from None
