"""A JSON array of objects, as LLaVA's data sets come, one object at a time: a file of a gigabyte takes a few megabytes.

The standard library's decoder reads each object from a window that slides over the file. It is the decoder of the JSON
lines too, so that a row means the same in both; and it tells where a row begins, by which its pictures are found again.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.core import brief
from pipeline.records.formats.row import MAX_ROW, MAX_VALUES, BadRow, Row, too_many_values
from pipeline.records.images import ImageError

CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


class _Window:
    """Decoded text of a file around a moving position; bytes that are not UTF-8 come as half surrogates."""

    def __init__(self, file: BinaryIO, offset: int = 0) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False
        self._mark, self._offset = 0, offset  # a place in the text, and in the file
        file.seek(offset)

    def offset(self) -> int:
        """The byte that the position is at."""
        self._offset += len(self.text[self._mark : self.at].encode("utf-8", "surrogateescape"))
        self._mark = self.at
        return self._offset

    def grow(self) -> bool:
        """Read on, twice as far each time that the text before the position does not give way; False at the end."""
        if self.ended:
            return False
        data = self._file.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not data
        self.offset()
        self.text, self.at, self._mark = self.text[self.at :] + self._decoder.decode(data, final=self.ended), 0, 0
        return True

    def peek(self) -> str:
        """The next character that is not a space; "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""


class _Decoder:
    """Decodes one value; what is wrong with it but leaves its end known is told, so that only this row is lost."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)
        self.problem = ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            self.problem = "not a JSON object: a key stands twice"
        return content

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's limit on digits
            self.problem = "a number has too many digits"
            return 0

    def decode(self, window: _Window) -> Any:
        """The value at the window's position, which moves behind it; raises ValueError or RecursionError."""
        while True:
            self.problem = ""
            try:
                value, end = self._decoder.raw_decode(window.text, window.at)
                if _SPACE.fullmatch(window.text, end) is None or window.ended:  # something follows: it is not cut here
                    window.at = end
                    return value
            except (ValueError, RecursionError):
                if window.ended:
                    raise
            if len(window.text) - window.at > MAX_ROW:
                raise ValueError(f"no end within {MAX_ROW >> 20} MiB")
            if too_many_values(window.text[window.at :]):
                raise ValueError(f"more than {MAX_VALUES:,} values in one row")
            window.grow()


def _enter(window: _Window, decoder: _Decoder, key: str) -> bool:
    """Move into an object, to the value of `key`; False where there is none. Raises as `_Decoder.decode` does."""
    if window.peek() != "{":
        return False
    while window.peek() not in ("}", ""):
        window.at += 1  # behind the brace or a comma
        if window.peek() == "}":
            return False
        name = decoder.decode(window)
        if window.peek() != ":":
            return False
        window.at += 1
        window.peek()
        if name == key:
            return True
        decoder.decode(window)
    return False


class JsonArray:
    """A file that is one JSON array, or an object with one under the key `under`; a row's key is its offset in bytes."""

    def __init__(self, file: str, under: str = "") -> None:
        self.file, self._under = file, under

    def names(self) -> None:
        """Every row has its own keys."""

    def rows(self) -> Iterator[Row | BadRow]:
        number = 0
        with open(self.file, "rb") as file:
            window, decoder = _Window(file), _Decoder()
            if window.peek() == "\ufeff":
                window.at += 1
            try:
                found = not self._under or _enter(window, decoder, self._under)
            except (ValueError, RecursionError) as error:
                yield self._broken(0, f"broken JSON at byte {window.offset():,}: {brief(error)}")
                return
            if not found or window.peek() != "[":
                yield self._broken(0, f"expected a JSON array{f' under {self._under!r}' if self._under else ''}")
                return
            window.at += 1
            if window.peek() == "]":
                window.at += 1
            else:
                while True:
                    window.peek()
                    offset = window.offset()
                    try:
                        value = decoder.decode(window)
                    except (ValueError, RecursionError) as error:
                        yield self._broken(number, f"broken JSON at byte {offset:,}: {brief(error)}")
                        return
                    yield self._row(value, number, offset, decoder.problem)
                    number += 1
                    following = window.peek()
                    window.at += 1
                    if following == "]":
                        break
                    if following != ",":
                        what = f"{following!r} instead of a comma" if following else "the array has no end"
                        yield self._broken(number, f"broken JSON at byte {window.offset() - len(following):,}: {what}")
                        return
            if window.peek() and not self._under:
                yield self._broken(number, f"text behind the array, at byte {window.offset():,}")

    def _row(self, value: object, number: int, offset: int, problem: str) -> Row | BadRow:
        if problem:
            return BadRow(self.file, number, problem)
        if not isinstance(value, dict):
            return BadRow(self.file, number, f"expected a JSON object, got {type(value).__name__}")
        return Row(self.file, number, value, offset)

    def _broken(self, number: int, reason: str) -> BadRow:
        return BadRow(self.file, number, reason, "mend the file: rows behind this cannot be read", ends_file=True)

    def content(self, key: int) -> dict[str, Any]:
        with open(self.file, "rb") as file:
            try:
                value = _Decoder().decode(_Window(file, key))
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, dict):
            where = f"{self.file}: byte {key}"
            raise ImageError("no row begins here any more", where=where, remedy="run the stage again")
        return value
