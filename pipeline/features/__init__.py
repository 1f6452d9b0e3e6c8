"""The feature store: a folder of shards and their list; the answer to "the row of this image".

Reads what `stages.extract` wrote (pipeline.extraction). A missing or damaged shard is an error by name, never zeros.
`python -m pipeline.features verify|info|show` looks after one from the command line.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.errors import ARTEFACT, PipelineError, brief
from pipeline.shards import Shard

INDEX = "index.json"


class FeatureStore:
    """Random rows by image hash over all shards of one folder.

    `spec` says which encoder made them; `tokens` (P) and `width` (Dv) give a row's shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            listed = [(str(shard["file"]), int(shard["rows"])) for shard in index["shards"]]
            self.spec: dict[str, Any] = index["spec"]
            self.tokens, self.width = int(self.spec["tokens"]), int(self.spec["width"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(
                f"no feature store: {brief(error)}", where=str(self.folder), remedy="dvc repro extract", code=ARTEFACT
            ) from None
        self.shards = [Shard(self.folder / name) for name, _ in listed]
        for shard, (name, rows) in zip(self.shards, listed, strict=True):
            if len(shard) != rows or shard.spec != self.spec:
                raise PipelineError(
                    f"{name} is not the shard that {INDEX} lists",
                    where=str(self.folder),
                    remedy="dvc repro -f extract",
                    code=ARTEFACT,
                )
        self._starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, hashes: np.ndarray) -> np.ndarray:
        """Row numbers int64 [n] of images uint8 [n, 32]; raises `PipelineError` naming the first one not stored."""
        stored = np.concatenate([shard.hashes for shard in self.shards]) if self.shards else np.empty((0, 32), np.uint8)
        rows = pc.index_in(_as_arrow(hashes), value_set=_as_arrow(stored))
        if rows.null_count:
            missing = int(np.flatnonzero(rows.is_null().to_numpy(zero_copy_only=False))[0])
            raise PipelineError(
                f"no features for {rows.null_count} of {len(rows)} images, first {hashes[missing].tobytes().hex()[:16]}…",
                where=str(self.folder),
                remedy="dvc repro extract",
                code=ARTEFACT,
            )
        return rows.to_numpy().astype(np.int64)

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Patch features float16 [n, P, Dv] of rows [n], in that order."""
        out = np.empty((len(rows), self.tokens, self.width), np.float16)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owner):
            here = np.flatnonzero(owner == number)
            if len(here) == len(rows):
                self.shards[number].read(rows - self._starts[number], out)
                continue
            part = np.empty((len(here), self.tokens, self.width), np.float16)
            self.shards[number].read(rows[here] - self._starts[number], part)
            out[here] = part
        return torch.from_numpy(out)

    def check_encoder(self, spec: dict[str, Any]) -> None:
        """Refuse features of another encoder than `spec` describes, naming the first difference."""
        for key in sorted(spec.keys() | self.spec.keys()):
            if spec.get(key) != self.spec.get(key):
                raise PipelineError(
                    f"features were made with {key} {_short(self.spec.get(key))}, params ask for {_short(spec.get(key))}",
                    where=str(self.folder),
                    remedy="dvc repro extract",
                    code=ARTEFACT,
                )


def _as_arrow(hashes: np.ndarray) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(hashes, dtype=np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(hashes), [None, data])


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"{text[:39]}…"
