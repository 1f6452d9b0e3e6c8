"""Which shards a set of images makes, and which of them, and of their rows, the stores already hold."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from pipeline.core import fingerprint
from pipeline.features.decoding import DecodedImages
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.store.shards import Shard, shard_name
from pipeline.features.store.store import ShardSet
from pipeline.records import ImageError, as_arrow


@dataclass(frozen=True, slots=True)
class NewShard:
    """A shard that no store holds: its hashes [n, 32], the known row of each image or -1 [n], the numbers of fresh images.

    `before` tells the file that is to be replaced, where one is there that lacks an image which can be decoded.
    """

    path: Path
    hashes: np.ndarray
    stored: np.ndarray
    fresh: np.ndarray
    before: tuple[int, int] | None = None

    def is_written(self) -> bool:
        """Whether it is there, by whoever's hand."""
        return file_identity(self.path) not in (None, self.before)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The output's shards in order, those of them that are `todo`, and all rows that the stores know."""

    paths: list[Path]
    todo: list[NewShard]
    known: ShardSet

    @property
    def encode(self) -> int:
        """Images that no store knows."""
        return sum(len(shard.fresh) for shard in self.todo)


def plan_shards(
    images: DecodedImages, hashes: np.ndarray, encoder: Encoder, folders: list[Path], shard_rows: int, *, skip: bool
) -> ShardPlan:
    """Which shards the images make, and which of these and of their rows the stores in `folders` hold."""
    parts = [slice(start, start + shard_rows) for start in range(0, len(hashes), shard_rows)]
    names = [shard_name(fingerprint(encoder.row_spec()), hashes[part]) for part in parts]
    found = [
        next((path for folder in folders if _can_be_taken(path := folder / name, part, hashes, images, skip=skip)), None)
        for name, part in zip(names, parts, strict=True)
    ]
    missing = [(name, part) for name, part, path in zip(names, parts, found, strict=True) if path is None]
    known = ShardSet([Shard(path) for folder in folders if missing for path in sorted(folder.glob("*.h5"))], encoder.row_format)
    todo = []
    for name, part in missing:
        stored = known.find(hashes[part])
        path, fresh = folders[0] / name, part.start + np.flatnonzero(stored < 0)
        todo.append(NewShard(path, hashes[part], stored, fresh, file_identity(path)))
    return ShardPlan([path or folders[0] / name for path, name in zip(found, names, strict=True)], todo, known)


def holds(path: Path, hashes: np.ndarray) -> np.ndarray:
    """For each image, hashes [n, 32], whether a shard has its row: bool [n]. Where all were bad there is no shard."""
    if not path.exists():
        return np.zeros(len(hashes), bool)
    return pc.is_in(as_arrow(hashes), value_set=as_arrow(Shard(path).hashes)).to_numpy(zero_copy_only=False)


def file_identity(path: Path) -> tuple[int, int] | None:
    """Which file is at a path, None for none: one that takes its place is another."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _can_be_taken(path: Path, part: slice, hashes: np.ndarray, images: DecodedImages, *, skip: bool) -> bool:
    """Whether every image is in a stored shard that can be decoded, and nothing else; bad ones may be left out."""
    if not path.exists() or not Shard(path).hashes.any(1).all():  # written by a version that left empty rows
        return False
    for row in np.flatnonzero(~holds(path, hashes[part])).tolist():
        error = images.error(part.start + row)
        if error is not None and not skip:
            raise error
        if not isinstance(error, ImageError):  # it can be decoded now
            return False
    return True
