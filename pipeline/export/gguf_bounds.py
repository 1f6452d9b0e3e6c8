"""A GGUF file from outside, walked through before a library does: what it counts must be there, and of a size that models have.

The library that reads GGUF trusts every count in the file, and makes an array for each thing that is counted.
"""

import struct
from pathlib import Path
from typing import BinaryIO

MAX_ENTRIES = 1 << 16  # metadata, and tensors
MAX_ITEMS = 1 << 21  # of all lists together: a vocabulary, its scores, kinds and merges
MAX_TEXT = 16 << 20  # bytes of one text, such as a chat template
MAX_DIMENSIONS = 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9


def check_counts(path: Path) -> None:
    """Raises ValueError for a file that is none, is cut off, or counts more than it holds or any model has."""
    with path.open("rb") as file:
        walk = _Walk(file, path.stat().st_size)
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin as one")
        version, tensors, entries = walk.number("<I"), walk.number("<Q"), walk.number("<Q")
        if version not in (2, 3) or tensors > MAX_ENTRIES or entries > MAX_ENTRIES:
            raise ValueError(f"version {version} with {tensors:,} tensors and {entries:,} metadata; {MAX_ENTRIES:,} are the most")
        for _ in range(entries):
            walk.text()
            walk.value(walk.number("<I"))
        for _ in range(tensors):
            walk.text()
            if (dimensions := walk.number("<I")) > MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions:,} dimensions")
            count = 1
            for _ in range(dimensions):
                count *= walk.number("<Q")
            walk.skip(12)
            if count > 32 * walk.size:  # of a number, a quarter of a bit at least
                raise ValueError(f"a tensor of {count:,} numbers, in a file of {walk.size:,} bytes")


class _Walk:
    """A place in the file that no read moves behind its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self._items = file, size, 0

    def number(self, form: str) -> int:
        data = self._file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError("cut off")
        return int(struct.unpack(form, data)[0])

    def skip(self, count: int) -> None:
        if self._file.tell() + count > self.size:
            raise ValueError("cut off")
        self._file.seek(count, 1)

    def text(self) -> None:
        if (length := self.number("<Q")) > MAX_TEXT:
            raise ValueError(f"a text of {length:,} bytes, more than {MAX_TEXT:,}")
        self.skip(length)

    def value(self, kind: int) -> None:
        if kind == _TEXT:
            self.text()
        elif kind == _LIST:
            self._list()
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"a value of the unknown kind {kind}")

    def _list(self) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        self._items += count
        if self._items > MAX_ITEMS:
            raise ValueError(f"lists of {self._items:,} items, more than {MAX_ITEMS:,}")
        if kind == _LIST:
            raise ValueError("a list of lists")
        if kind == _TEXT:
            for _ in range(count):
                self.text()
        elif kind in _SIZES:
            self.skip(count * _SIZES[kind])
        else:
            raise ValueError(f"a list of the unknown kind {kind}")
