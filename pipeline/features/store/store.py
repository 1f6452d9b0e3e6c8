"""The feature store: a folder of shards and their list; the answer to "the row of this image".

Reads what `stages.extract` wrote (pipeline.features.extraction). A missing or damaged shard is an error by name, never zeros.
`python -m pipeline.features verify|info|show` looks after one from the command line.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.core import ARTEFACT, PipelineError, brief, seal, unseal, write_json
from pipeline.features.resampling import KEY, warn_of_resampling
from pipeline.features.store.mapping import open_rows
from pipeline.features.store.row_format import Float16Format, RowFormat
from pipeline.features.store.shards import Shard
from pipeline.records import as_arrow

INDEX = "index.json"
WARM = 3e9  # bytes a second: memory is faster, disks that random rows come from are slower
LOOK_AGAIN = 16  # batches that are announced after one that came from disk


class ShardSet:
    """Random rows over shards of one encoder: numbered through, found by image hash, read from memory or disk.

    `row_format` says how they are stored; `starts` [shards + 1] is the number of each shard's first row.
    """

    def __init__(self, shards: Sequence[Shard], row_format: RowFormat) -> None:
        self.shards, self.row_format = shards, row_format
        self.starts = np.cumsum([0, *(len(shard) for shard in shards)])
        parts = [(shard.path, shard.offset) for shard in shards]
        self._map = open_rows(parts, row_format.shape, row_format.dtype) if shards else None
        first = self._map.first if self._map else np.empty(0, np.int64)
        self._place = np.arange(len(self)) + np.repeat(first - self.starts[:-1], np.diff(self.starts))  # in the map
        self._verified, self._unverified = np.zeros(len(self), bool), len(self)
        self._announce = LOOK_AGAIN

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Row numbers int64 [n] of images uint8 [n, 32]; -1 where an image is not here."""
        stored = pa.chunked_array([as_arrow(shard.hashes) for shard in self.shards], pa.binary(32))
        found = pc.index_in(as_arrow(hashes), value_set=stored)
        return found.fill_null(-1).to_numpy().astype(np.int64)

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Patch features float16 [n, P, Dv] of rows [n], in that order, in fresh memory."""
        return self.row_format.decode(torch.from_numpy(self.stored(rows)))

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n] as they are stored, [n, *self.row_format.shape], in fresh memory."""
        out = np.empty((len(rows), *self.row_format.shape), self.row_format.dtype)
        self.announce(rows)
        self.read_into(rows, out)
        return out

    def announce(self, rows: np.ndarray) -> None:
        """Have rows read from disk ahead of `read_into`; does nothing while rows come from memory."""
        if not self._announce:
            return
        owner = self._owners(rows)
        for number, row in zip(owner.tolist(), (rows - self.starts[owner]).tolist(), strict=True):
            self.shards[number].announce(row)

    def read_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows [n] as they are stored into `out` [n, *self.row_format.shape], which a caller reuses.

        Safe in several threads. Raises `PipelineError` naming the file and the image of a row that fails its checksum.
        """
        if not out.flags.c_contiguous:
            raise ValueError("rows are copied to one piece of memory")
        began = time.perf_counter()
        if self._map:
            self._map.take(self._place[rows], out)
        if self._unverified:
            self._verify(rows, out)
        warm = out.nbytes > WARM * (time.perf_counter() - began)
        self._announce = max(0, self._announce - 1) if warm else LOOK_AGAIN

    def _verify(self, rows: np.ndarray, read: np.ndarray) -> None:
        """Check those of rows [n] that this process reads for the first time."""
        fresh = np.flatnonzero(~self._verified[rows])
        owner = self._owners(rows)
        for i in fresh.tolist():
            self.shards[owner[i]].check(int(rows[i] - self.starts[owner[i]]), read[i])
        self._verified[rows[fresh]] = True
        if len(fresh):
            self._unverified = len(self) - int(np.count_nonzero(self._verified))

    def _owners(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1


class FeatureStore(ShardSet):
    """Random rows by image hash over all shards of one folder.

    `spec` says which encoder made them; `tokens` (P) and `width` (Dv) give a row's shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            index = unseal((self.folder / INDEX).read_text(encoding="utf-8"))
            listed = [(str(shard["file"]), int(shard["rows"])) for shard in index["shards"]]
            self.spec: dict[str, Any] = index["spec"]
            self.tokens, self.width = int(self.spec["tokens"]), int(self.spec["width"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(
                f"no feature store: {brief(error)}",
                where=str(self.folder / INDEX),
                remedy="dvc repro -f -s extract" if (self.folder / INDEX).exists() else "dvc repro extract",
                code=ARTEFACT,
            ) from None
        shards = [Shard(self.folder / name) for name, _ in listed]
        super().__init__(shards, shards[0].row_format if shards else Float16Format(self.tokens, self.width))
        for shard, (name, rows) in zip(self.shards, listed, strict=True):
            if len(shard) != rows or shard.spec != self.spec:
                raise PipelineError(
                    f"{name} is not the shard that {INDEX} lists",
                    where=str(self.folder),
                    remedy="dvc repro -f extract",
                    code=ARTEFACT,
                )

    def locate(self, hashes: np.ndarray) -> np.ndarray:
        """Row numbers int64 [n] of images uint8 [n, 32]; raises `PipelineError` naming the first one not stored."""
        rows = self.find(hashes)
        if len(missing := np.flatnonzero(rows < 0)):
            raise PipelineError(
                f"no features for {len(missing)} of {len(rows)} images, first {hashes[missing[0]].tobytes().hex()[:16]}…",
                where=str(self.folder),
                remedy="dvc repro extract",
                code=ARTEFACT,
            )
        return rows

    def check_encoder(self, spec: dict[str, Any]) -> None:
        """Refuse features of another encoder than `spec` describes, naming the first difference.

        Images of a call are none: rows are as exact in any number of them, and `extract` keeps rows of two numbers apart, as it
        does those of two versions of Pillow, which is a warning.
        """
        warn_of_resampling(self.spec, str(self.folder), "dvc repro -f -s extract")
        for key in sorted((spec.keys() | self.spec.keys()) - {"batch", KEY}):
            if spec.get(key) != self.spec.get(key):
                raise PipelineError(
                    f"features were made with {key} {_short(self.spec.get(key))}, params ask for {_short(spec.get(key))}",
                    where=str(self.folder),
                    remedy="dvc repro extract",
                    code=ARTEFACT,
                )


def write_index(folder: Path, shards: Sequence[tuple[str, int]], spec: dict[str, Any]) -> None:
    """Make a folder's shards (file name, rows) a store, which `FeatureStore` opens."""
    listed = [{"file": name, "rows": rows} for name, rows in shards]
    write_json(folder / INDEX, seal({"shards": listed, "spec": spec}))


def member_folders(folder: Path, count: int = 0) -> list[Path]:
    """Where the store of each encoder lies: `folder` itself for one encoder, numbered folders in it for several.

    `count` is how many there are; 0: as many as are there.
    """
    if not count:
        count = 1 if (folder / INDEX).exists() else max(1, len(list(folder.glob(f"[0-9]*/{INDEX}"))))
    return [folder] if count == 1 else [folder / str(number) for number in range(1, count + 1)]


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"{text[:39]}…"
