"""The examples of one token table with all that turns them into batches, for training and for measuring alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.core import merged_tokens
from pipeline.features import FeatureSource
from pipeline.text import TokenTable
from pipeline.vlm.batches.collate import Batch, collate
from pipeline.vlm.batches.sharing import Sharing, no_sharing


@dataclass(frozen=True)
class Examples:
    """A token table, where its images' patch features come from, and which of its rows begin alike.

    Attributes:
        image_id: the placeholder token's id.
        shared: rows that share their beginning (see `pipeline.vlm.batches.sharing`); None = every row for itself.
        factor: factor x factor patches are one token of the language model.
    """

    table: TokenTable
    source: FeatureSource
    image_id: int
    shared: Sharing | None = None
    factor: int = 1

    @cached_property
    def sharing(self) -> Sharing:
        """`shared`, or every row for itself."""
        return self.shared or no_sharing(self.table.lengths)

    def collate(self, units: Sequence[np.ndarray], *, pack: int = 0) -> Batch:
        """Units of rows -> one batch (see `pipeline.vlm.batches.collate`)."""
        tokens = merged_tokens(self.source.tokens, self.factor)
        return collate(self.table, units, image_id=self.image_id, tokens=tokens, sharing=self.sharing, pack=pack)

    def load(self, units: Sequence[np.ndarray]) -> tuple[Batch, Any]:
        """A batch and what its features need (see `FeatureSource.load`)."""
        batch = self.collate(units)
        return batch, self.source.load(batch.slots)
