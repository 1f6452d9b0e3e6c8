"""Rows of Parquet and Arrow files as they are, for data that are no conversations, and the pictures that stand within them."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline.records.formats.detect import READERS, detect
from pipeline.records.formats.pictures import Pictures, listed, name_of
from pipeline.records.formats.row import BadRow, Reader, Row


def _is_one_of(columns: frozenset[str], name: str) -> bool:
    return name in columns


def _open(columns: frozenset[str], file: str) -> Reader:
    return READERS[detect(file)](file, partial(_is_one_of, columns), True)


def _pictures_of(column: str, content: dict[str, Any]) -> list[Any]:
    return listed(content.get(column), "")


class Rows:
    """Files with the same columns, in order.

    Args:
        files: Parquet or Arrow; told from their content.
        columns: those that are read.
        picture: the column of the row's picture, or of a list of them; a picture that is a name lies below `root`.

    Attributes:
        images: the pictures' bytes, by the names that `names` gives.
    """

    def __init__(self, files: Sequence[str], columns: Collection[str], *, picture: str, root: str) -> None:
        self.files, self.columns, self._picture = tuple(files), frozenset(columns), picture
        opened, own = partial(_open, frozenset({picture})), frozenset(files)
        self.images = Pictures(root, root, own, opened, partial(_pictures_of, picture))

    def __iter__(self) -> Iterator[Row | BadRow]:
        """Every row once, in constant memory; a damaged one says what is wrong with it."""
        for file in self.files:
            yield from _open(self.columns, file).rows()

    def missing(self, wanted: Collection[str]) -> list[tuple[str, str]]:
        """Each file that lacks one of the columns, and which."""
        found = ((file, set(_open(self.columns, file).names() or ())) for file in self.files)
        return [(file, column) for file, names in found for column in sorted(set(wanted) - names)]

    def names(self, row: Row) -> list[str]:
        """What `images` calls the row's pictures; raises `PipelineError` for what is no picture."""
        pictures = listed(row.content.get(self._picture), row.where)
        return [
            name_of(picture, slot, row.file, row.key, frozenset(self.files), row.where) for slot, picture in enumerate(pictures)
        ]

    def name_within(self, row: Row) -> str:
        """What `images` calls the picture that stands within a row whose pictures were not read."""
        return name_of(b"unread", 0, row.file, row.key, frozenset(self.files), row.where)
