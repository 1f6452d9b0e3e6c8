"""What one forward pass takes: token ids, labels and the places of images."""

from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, right-padded.

    Attributes:
        ids: int64 [B, T]; a row is a unit: a conversation, or several that share their beginning. Packed, B is 1 and the
            row holds all units.
        real: bool [B, T], positions that are not padding (only a mixture's router asks).
        keep: bool [B, T], positions whose next token is supervised.
        kept: int64 [supervised], the same as places among the B × T.
        labels: int64 [supervised], those next tokens, row by row.
        slots: int64 [S], number of the image slot whose features are needed, one for each image run.
        slot_row, slot_start: int64 [S], where its P placeholders stand.
        tokens: how many of the B × T positions are no padding.
        branch, position: int16 and int64 [B, T] (see `pipeline.vlm.batches.sharing`); None where no row is shared and none packed.
        document: int32 [B, T], which unit a token is of, where units are packed (see `pipeline.vlm.batches.packing`).
    """

    ids: torch.Tensor
    real: torch.Tensor
    keep: torch.Tensor
    kept: torch.Tensor
    labels: torch.Tensor
    slots: np.ndarray
    slot_row: torch.Tensor
    slot_start: torch.Tensor
    tokens: int
    branch: torch.Tensor | None = None
    position: torch.Tensor | None = None
    document: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        names = ("ids", "real", "keep", "kept", "labels", "slot_row", "slot_start", "branch", "position", "document")
        here = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in here.items()})
