"""Which rows of a data set are used: those whose pictures can be read, on the side of a held-out part that is asked for.

On which side a picture falls follows from its bytes, the seed and the share alone: rows may come, go, move or be renamed,
and every picture stays where it was. A row without pictures falls by its text. Whether a picture can be used follows from
its bytes too. So whoever asks, in whatever stage, gets the same answer.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.core import ARTEFACT, PipelineError, brief, map_array
from pipeline.records.decoder import decode
from pipeline.records.formats.row import BadRow, bad_record
from pipeline.records.formats.source import draw
from pipeline.records.images import ImageError, Images, digest
from pipeline.records.record import ImageSlot, Record

Side = Literal["train", "heldout"]
KEPT = 1_000_000  # digests remembered by name: a picture's rows mostly stand near each other


class GoodImages:
    """The pictures that are known to decode: a sorted table of their hashes, mapped, so that processes share it.

    Raises `PipelineError` when `path` is no such table.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                if file.read(8) != b"\x93NUMPY\1\0":  # what np.save writes; a later version may have a header of gigabytes
                    raise ValueError("not a table that this program has written")
            self._hashes = map_array(path)
            if self._hashes.dtype != np.uint8 or self._hashes.shape[1:] != (32,):
                raise ValueError(f"{self._hashes.dtype} {self._hashes.shape}, expected hashes")
        except Exception as error:  # a header is a Python literal, and raises what Python's parser does
            raise PipelineError(
                f"cannot be read: {brief(error)}", where=str(path), remedy="dvc repro extract", code=ARTEFACT
            ) from None
        self._keys = self._hashes.reshape(-1).view("S32") if len(self._hashes) else np.empty(0, "S32")

    def __contains__(self, key: bytes) -> bool:
        place = int(np.searchsorted(self._keys, np.bytes_(key)))
        return place < len(self._keys) and self._hashes[place].tobytes() == key

    @staticmethod
    def write(path: Path, hashes: np.ndarray) -> None:
        """Hashes uint8 [n, 32] in any order -> such a file. Raises `OSError`, which `np.save` may keep to itself."""
        table = np.sort(np.ascontiguousarray(hashes).reshape(-1).view("S32")).view(np.uint8).reshape(-1, 32)
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(table))
            file.write(table.reshape(-1).data)


class Digests:
    """SHA-256 of images by name, each read once while it is remembered.

    Args:
        good: pictures that need not be decoded to know that they can be.
    """

    def __init__(self, images: Images, good: GoodImages | None = None) -> None:
        self._images, self._good = images, good
        self._known = dict[str, bytes]()
        self._decoded = dict[str, bytes | tuple[str, str, str]]()  # or what is wrong: an error itself would hold the bytes
        self._sound = dict[bytes, bool]()  # a picture that stands in many rows is decoded for the first of them

    def __call__(self, name: str) -> bytes:
        """The hash of one image; raises `ImageError` for one that cannot be read."""
        found = self._known.get(name)  # once: another thread may forget it
        if found is None:
            found = digest(self._images.read(name))
            _keep(self._known, name, found)
        return found

    def digest_of_decodable(self, name: str) -> bytes:
        """The hash of one image; raises `ImageError` for one that cannot be read or decoded."""
        found = self._decoded.get(name)
        if found is None:
            try:
                found = self._decode(name)
            except ImageError as error:
                found = error.what, error.where, error.remedy
            _keep(self._decoded, name, found)
        if isinstance(found, tuple):
            what, where, remedy = found
            raise ImageError(what, where=where, remedy=remedy)
        return found

    def _decode(self, name: str) -> bytes:
        known = self._known.get(name)
        if known is not None and self._good is not None and known in self._good:
            return known
        data = self._images.read(name)
        key = digest(data)
        if key not in self._sound and (self._good is None or key not in self._good):
            decode(data, where=self._images.place(name))
            _keep(self._sound, key, True)
        return key


def _keep(known: dict[Any, Any], name: object, value: object) -> None:
    if len(known) >= KEPT:
        known.clear()
    known[name] = value


def readable(rows: Iterable[Record | BadRow], digest_of: Callable[[str], bytes]) -> Iterator[Record | BadRow]:
    """Every row; one with a picture of which `digest_of` raises an `ImageError` is bad."""
    for row in rows:
        if isinstance(row, Record):
            try:
                for name in row.images:
                    digest_of(name)
            except ImageError as error:
                yield bad_record(row, f"{error.where}: {error.what}", error.remedy)
                continue
        yield row


def is_held_out(key: bytes, *, share: float, seed: int) -> bool:
    """The side of one image (its SHA-256, 32 bytes): True for `share` of all images, whatever else there is."""
    return draw(b"%d:" % seed + key) < share


class Split:
    """Deals records out to two sides; rows whose pictures fall on both sides go to neither, and are counted."""

    def __init__(self, digest_of: Callable[[str], bytes], *, share: float, seed: int) -> None:
        if not 0 < share < 1:
            raise PipelineError(f"share {share}, expected more than 0 and less than 1", where="data.heldout.share")
        self._digest_of, self._share, self._seed = digest_of, share, seed
        self.counts = {"train": 0, "heldout": 0, "neither": 0}
        self.neither: list[str] = []  # the first ten

    def side(self, record: Record) -> Side | None:
        """Where a record goes; None when it has pictures of both sides. Raises `PipelineError` for an unreadable one."""
        keys = [self._digest_of(name) for name in record.images] or [digest(_text(record))]
        sides = {is_held_out(key, share=self._share, seed=self._seed) for key in keys}
        return None if len(sides) > 1 else "heldout" if sides.pop() else "train"

    def records(self, rows: Iterable[Record | BadRow], side: Side) -> Iterator[Record | BadRow]:
        """The records of one side, and every bad row; one whose picture cannot be read is bad."""
        self.counts, self.neither = dict.fromkeys(self.counts, 0), []
        for row in readable(rows, self._digest_of):
            if isinstance(row, BadRow):
                yield row
                continue
            found = self.side(row)
            self.counts[found or "neither"] += 1
            if found == side:
                yield row
            elif found is None and len(self.neither) < 10:
                self.neither.append(row.where)


def _text(record: Record) -> bytes:
    said = [
        turn.role + "\0" + "\0".join(str(part) for part in turn.parts if not isinstance(part, ImageSlot)) for turn in record.turns
    ]
    return "\1".join(said).encode()
