"""A held-out part where the user has none: by image content, so that no picture is on both sides.

On which side a picture falls follows from its bytes, the seed and the share alone: rows may come, go, move or be renamed,
and every picture stays where it was. A row without pictures falls by its text.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

from pipeline.errors import PipelineError
from pipeline.formats.row import BadRow
from pipeline.formats.source import draw
from pipeline.images import digest
from pipeline.records import ImageSlot, Record

Side = Literal["train", "heldout"]
KEPT = 1_000_000  # digests remembered by name: a picture's rows mostly stand near each other


class ImageBytes(Protocol):
    """Whatever reads an image's bytes by its name: `ImageRoot`, `Pictures`, `MixedPictures`."""

    def read(self, name: str) -> bytes: ...


class Digests:
    """SHA-256 of images by name, each read once while it is remembered."""

    def __init__(self, images: ImageBytes) -> None:
        self._images, self._known = images, dict[str, bytes]()

    def __call__(self, name: str) -> bytes:
        if name not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[name] = digest(self._images.read(name))
        return self._known[name]


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
        for row in rows:
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                found = self.side(row)
            except PipelineError as error:
                file, _, place = row.where.rpartition(":")
                yield BadRow(file, int(place) if place.isdecimal() else place, f"{error.where}: {error.what}", error.remedy)
                continue
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
