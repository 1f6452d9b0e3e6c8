"""Which rows go together, and how they become tensors.

The plan is a pure function of (lengths, batch size, token budget, seed, epoch): no state, so a resumed run sees the
batches it would have seen. A step is a fixed number of rows drawn at random; neighbours of like length make them, so
that little is padding; a step is cut into micro-batches by tokens, padding included.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.errors import ARTEFACT, PipelineError
from pipeline.tokens import TokenTable

MEGABATCH = 50  # steps' worth of rows that are sorted by length together


def plan_epoch(lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each optimiser step of an epoch: every row exactly once, in an order that follows from the seed.

    Rows are shuffled, cut into megabatches, sorted by length within them and cut into steps, whose order is shuffled.
    This is the usual length grouping: the same mathematics in another order of stochastic gradient descent.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    steps: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * MEGABATCH):
        rows = order[start : start + batch_size * MEGABATCH]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        steps += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [steps[number] for number in rng.permutation(len(steps))]


def split_by_tokens(rows: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut rows into runs whose padded size (longest × count) stays within `budget` tokens; a longer row goes alone."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    parts, start = [], 0
    while start < len(rows):
        count = max(1, budget // int(lengths[rows[start]]))  # the first row is the longest
        parts.append(rows[start : start + count])
        start += count
    return parts


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, right-padded.

    Attributes:
        ids: int64 [B, T].
        real: bool [B, T], positions that are not padding (only a mixture's router asks).
        keep: bool [B, T], positions whose next token is supervised.
        labels: int64 [supervised], those next tokens, row by row.
        slots: int64 [S], number of the image slot whose features are needed, one for each image run.
        slot_row, slot_start: int64 [S], where its P placeholders stand.
    """

    ids: torch.Tensor
    real: torch.Tensor
    keep: torch.Tensor
    labels: torch.Tensor
    slots: np.ndarray
    slot_row: torch.Tensor
    slot_start: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        names = ("ids", "real", "keep", "labels", "slot_row", "slot_start")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(table: TokenTable, rows: np.ndarray, *, image_id: int, tokens: int) -> Batch:
    """Rows of a token table -> one padded batch; raises `PipelineError` naming a row whose images lack P placeholders."""
    if table.spec["tokens"] != tokens:
        raise PipelineError(
            f"rows hold {table.spec['tokens']} placeholders an image, features have {tokens} patches",
            where=str(table.path),
            remedy="dvc repro tokenize",
            code=ARTEFACT,
        )
    found = [table.row(int(row)) for row in rows]
    width = max(len(row.ids) for row in found)
    ids = np.zeros((len(found), width), np.int64)
    target = np.zeros((len(found), width), bool)
    for i, row in enumerate(found):
        ids[i, : len(row.ids)] = row.ids
        for start, end in row.spans:
            target[i, start:end] = True
    slot_row = np.repeat(np.arange(len(found)), [len(row.image_start) for row in found])
    slot_start = np.concatenate([row.image_start for row in found]).astype(np.int64)
    slots = np.concatenate([np.arange(row.slots.start, row.slots.stop) for row in found]).astype(np.int64)
    _check_runs(table, rows, ids, slot_row, slot_start, image_id, tokens)
    keep = np.zeros_like(target)
    keep[:, :-1] = target[:, 1:]
    return Batch(
        ids=torch.from_numpy(ids),
        real=torch.from_numpy(np.arange(width) < table.lengths[rows][:, None]),
        keep=torch.from_numpy(keep),
        labels=torch.from_numpy(ids[target]),
        slots=slots,
        slot_row=torch.from_numpy(slot_row),
        slot_start=torch.from_numpy(slot_start),
    )


def _check_runs(
    table: TokenTable, rows: np.ndarray, ids: np.ndarray, slot_row: np.ndarray, slot_start: np.ndarray, image_id: int, tokens: int
) -> None:
    if not len(slot_row):
        return
    positions = slot_start[:, None] + np.arange(tokens)  # [S, P]
    inside = positions < ids.shape[1]
    held = (ids[slot_row[:, None], np.minimum(positions, ids.shape[1] - 1)] == image_id) & inside
    if not held.all():
        bad = int(np.argmin(held.all(1)))
        raise PipelineError(
            f"an image needs {tokens} placeholders, found {int(held[bad].sum())} at token {slot_start[bad]}",
            where=table.where(int(rows[slot_row[bad]])),
            remedy="dvc repro -f tokenize",
            code=ARTEFACT,
        )
