"""A data set in any of the formats -> its records and the bytes of its pictures; several of them, weighted, as one."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.core import PipelineError, brief
from pipeline.records.formats.conversation import USUAL, Reading, turns_and_pictures
from pipeline.records.formats.detect import FORMATS, READERS, detect, expand, metadata_of, saved_files
from pipeline.records.formats.hub import fetch
from pipeline.records.formats.keys import Columns
from pipeline.records.formats.pictures import Pictures, name_of
from pipeline.records.formats.row import BadRow, Reader, Row
from pipeline.records.images import ImageError
from pipeline.records.record import Record


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What params.yaml says of one data set.

    Args:
        records: a file, a folder, a glob, a list of them, or the id of a hub data set.
        images: folder or zip of the pictures that rows name; "" = beside the records.
        format: one of `FORMATS`, or "auto": told from each file's content.
        columns: where a row keeps its parts, when not under their usual names.
        prompt: what a caption answers; `<image>` in it is the picture.
        unplaced: a row with pictures and no `<image>`: "refuse" it, or put them "first".
        split, revision: of a hub data set.
        limit: the first records only; 0 = all.
        links: below folders that rows name files in: "follow" them, or "refuse" those that lead out.
        weight: how often each row is taken, in a mixture: 2 = twice, 0.25 = a seeded quarter of them.
        name: what messages call it; "" = its (first) records.
    """

    records: str | tuple[str, ...]
    images: str = ""
    format: str = "auto"
    columns: Columns = USUAL
    prompt: str = "<image>"
    unplaced: str = "refuse"
    split: str = ""
    revision: str = ""
    limit: int = 0
    links: str = "follow"
    weight: float = 1.0
    name: str = ""


def _open(formats: dict[str, str], wanted: Callable[[str], bool], follow: bool, file: str) -> Reader:
    return READERS[formats[file]](file, wanted, follow)


def _pictures_of(reading: Reading, content: dict[str, Any]) -> list[Any]:
    return turns_and_pictures(content, reading, where="")[1]


class Source:
    """One data set. Opening it finds its files and their formats; rows are read when asked for, as often as asked for."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self._reading = Reading(spec.columns, spec.prompt, spec.unplaced)
        self.formats = _formats(spec)
        self._files = frozenset(self.formats)
        follow = spec.links == "follow"
        opened = partial(_open, self.formats, spec.columns.is_wanted, follow)
        self._readers = [opened(file) for file in self.formats]
        for reader in self._readers:
            try:
                names = reader.names()
            except OSError as error:
                raise PipelineError(f"cannot be read: {error.strerror or brief(error)}", where=reader.file) from None
            if names is not None:
                spec.columns.check(names, reader.file)
        label = spec.name or (spec.records if isinstance(spec.records, str) else spec.records[0])
        root = _image_root(spec, self.formats)
        self.images = Pictures(label, root, self._files, opened, partial(_pictures_of, self._reading), follow=follow)

    def records(self) -> Iterator[Record | BadRow]:
        """Every row once, in order, as a record or as what is wrong with it; nothing behind the limit is looked at."""
        found = 0
        for reader in self._readers:
            for row in _rows(reader):
                made = self._record(row) if isinstance(row, Row) else row
                yield made
                found += isinstance(made, Record)
                if found and found == self.spec.limit:
                    return

    def _record(self, row: Row) -> Record | BadRow:
        try:
            where = row.where
            turns, pictures = turns_and_pictures(row.content, self._reading, where=where)
            names = [name_of(value, slot, row.file, row.key, self._files, where) for slot, value in enumerate(pictures)]
            return Record(where, tuple(names), turns)
        except PipelineError as error:
            return BadRow(row.file, row.row, error.what, error.remedy)


def _rows(reader: Reader) -> Iterator[Row | BadRow]:
    """A reader's rows; a file that vanishes or fails under it ends as one more bad row."""
    try:
        yield from reader.rows()
    except (OSError, PipelineError) as error:
        what = error.what if isinstance(error, PipelineError) else f"cannot be read on: {error.strerror or brief(error)}"
        yield BadRow(reader.file, "end", what, "mend the file: rows behind this cannot be read", ends_file=True)


def _formats(spec: SourceSpec) -> dict[str, str]:
    """Each file to read, in order, and its format; raises `PipelineError` naming the file that is not what it should be."""
    if spec.format not in ("auto", *FORMATS):
        raise PipelineError(f"no format {spec.format!r}", where="data.*.format", remedy=f"one of auto, {', '.join(FORMATS)}")
    if spec.format == "hub":
        names = (spec.records,) if isinstance(spec.records, str) else spec.records
        return {file: "arrow" for name in names for file in fetch(name, split=spec.split, revision=spec.revision)}
    formats: dict[str, str] = {}
    for name in expand(spec.records):
        kind = detect(name) if spec.format == "auto" else spec.format
        if os.path.isdir(name) != (kind == "folder") and not (kind == "arrow" and os.path.isdir(name)):
            what = "a folder" if os.path.isdir(name) else "a file"
            raise PipelineError(f"{what}, and its format is set to {kind}", where=name, remedy="set data.*.format to auto")
        if kind == "arrow" and os.path.isdir(name):
            formats |= dict.fromkeys(saved_files(name), "arrow")
        elif kind == "folder" and (table := metadata_of(name)):
            formats[table] = detect(table)
        else:
            formats[name] = kind
    return formats


def _image_root(spec: SourceSpec, formats: dict[str, str]) -> str:
    """Where files that rows name lie: as the spec says, else beside the records; "" where they lie in several places."""
    if spec.images or spec.format == "hub":
        return spec.images
    places = {file if kind == "folder" else os.path.dirname(file) or "." for file, kind in formats.items()}
    return places.pop() if len(places) == 1 else ""


class Mixture:
    """Several data sets as one, in their order, each row as often as its source's weight says.

    A fraction of a weight is drawn for each row by a hash of seed, source and row, so that the draw of a row does not
    depend on the other rows. Images are named `SOURCE:NAME`, sources numbered from 0. `counts` says of the sources that
    have been read to their end how many rows they have, bad ones included, and how many were taken.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources, self._seed = list(sources), seed
        self.images = MixedPictures([source.images for source in sources])
        self.counts: dict[str, tuple[int, int]] = {}
        for source in sources:
            if not (math.isfinite(source.spec.weight) and source.spec.weight > 0):
                raise PipelineError(f"weight {source.spec.weight}, expected more than 0", where=source.images.path)

    def records(self) -> Iterator[Record | BadRow]:
        """Every record as often as it is drawn, which may be never; every bad row once."""
        self.counts = {}
        for number, source in enumerate(self.sources):
            rows = taken = 0
            for row in source.records():
                rows += row.rows if isinstance(row, BadRow) else 1
                if isinstance(row, BadRow):
                    yield row
                    continue
                named = replace(row, images=tuple(f"{number}:{name}" for name in row.images))
                times = self.times(number, row.where)
                taken += times
                for _ in range(times):
                    yield named
            self.counts[source.images.path] = rows, taken

    def times(self, number: int, where: str) -> int:
        """How often the row at `where` of source `number` is taken."""
        whole, part = divmod(self.sources[number].spec.weight, 1)
        return int(whole) + (draw(f"{self._seed}:{number}:{where}".encode("utf-8", "surrogateescape")) < part)


class MixedPictures:
    """Bytes of the pictures of several sources, by `SOURCE:NAME`."""

    def __init__(self, parts: list[Pictures]) -> None:
        self.path, self._parts = ", ".join(part.path for part in parts), parts

    def place(self, name: str) -> str:
        """What messages call one image: where it lies, not its source's number."""
        part, rest = self._part(name)
        return part.place(rest)

    def read(self, name: str) -> bytes:
        """The bytes of one image; raises `ImageError` naming it."""
        part, rest = self._part(name)
        return part.read(rest)

    def _part(self, name: str) -> tuple[Pictures, str]:
        number, colon, rest = name.partition(":")
        if not colon or not number.isdecimal() or len(number) > 9 or int(number) >= len(self._parts):
            raise ImageError("no such source", where=f"{self.path}: {name!r}")
        return self._parts[int(number)], rest


def draw(key: bytes) -> float:
    """A number in [0, 1) that follows from `key` alone, evenly spread over keys."""
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48


def open_source(spec: SourceSpec | Sequence[SourceSpec], *, seed: int = 0) -> Source | Mixture:
    """One data set, or several with their weights; raises `PipelineError` for what no row can mend (a missing file, say)."""
    if isinstance(spec, SourceSpec):
        return Source(spec)
    return Mixture([Source(one) for one in spec], seed)
