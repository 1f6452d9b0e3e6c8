"""Where patch features come from: the store or the live encoder. Training asks either one the same question.

Both return float16 rows, and the live encoder's are rounded as the stored ones are, so the two agree bit for bit.
"""

from typing import Any, Protocol

import numpy as np
import torch

from pipeline.errors import ARTEFACT, PipelineError
from pipeline.features import FeatureStore
from pipeline.images import ImageRoot, digest
from pipeline.tokens import TokenTable
from pipeline.vision import Encoder


class FeatureSource(Protocol):
    """Answers for the image slots of one token table, in two steps: `load` may run ahead in a thread."""

    tokens: int
    width: int

    def load(self, slots: np.ndarray) -> Any:
        """Read what slots [S] need; no heavy computation."""
        ...

    def features(self, loaded: Any) -> torch.Tensor:
        """Patch features float16 [S, P, Dv] of the slots that were loaded, in their order."""
        ...


class StoredFeatures:
    """Features read from the store that `stages.extract` wrote."""

    def __init__(self, store: FeatureStore, table: TokenTable) -> None:
        self._store, self.tokens, self.width = store, store.tokens, store.width
        self._rows = store.locate(table.image_hashes())

    def load(self, slots: np.ndarray) -> torch.Tensor:
        return self._store.read(self._rows[slots])

    def features(self, loaded: torch.Tensor) -> torch.Tensor:
        return loaded


class LiveFeatures:
    """Features computed from the image files as they are needed; a picture that stands twice in a batch is encoded once."""

    def __init__(self, encoder: Encoder, root: ImageRoot, table: TokenTable) -> None:
        self._encoder, self._root = encoder, root
        self.tokens, self.width = encoder.tokens, encoder.width
        self._names, self._hashes = table.image_names(), table.image_hashes()

    def load(self, slots: np.ndarray) -> tuple[torch.Tensor | None, list[str], torch.Tensor]:
        distinct: dict[bytes, tuple[int, int]] = {}
        place = [distinct.setdefault(self._hashes[slot].tobytes(), (len(distinct), int(slot)))[0] for slot in slots]
        names = [self._names[slot].as_py() for _, slot in distinct.values()]
        pixels = [self._pixels(name, key) for name, key in zip(names, distinct, strict=True)]
        return torch.from_numpy(np.stack(pixels)) if pixels else None, names, torch.tensor(place, dtype=torch.long)

    def features(self, loaded: tuple[torch.Tensor | None, list[str], torch.Tensor]) -> torch.Tensor:
        pixels, names, place = loaded
        if pixels is None:
            return torch.empty(0, self.tokens, self.width, dtype=torch.float16)
        return self._encoder.encode(pixels, names)[place]

    def _pixels(self, name: str, key: bytes) -> np.ndarray:
        where = f"{self._root.path}: {name}"
        data = self._root.read(name)
        if digest(data) != key:
            raise PipelineError("its bytes are not those that were tokenised", where=where, remedy="dvc repro", code=ARTEFACT)
        return self._encoder.preprocess(data, where=where)


class NoFeatures:
    """The blind control: every image is all zeros."""

    def __init__(self, source: FeatureSource) -> None:
        self.tokens, self.width = source.tokens, source.width

    def load(self, slots: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(slots), self.tokens, self.width, dtype=torch.float16)

    def features(self, loaded: torch.Tensor) -> torch.Tensor:
        return loaded
