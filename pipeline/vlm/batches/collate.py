"""Rows of a token table -> the tensors of one batch: padded to one width, or end to end in one row on GPUs."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.core import ARTEFACT, PipelineError
from pipeline.text import Row, TokenTable
from pipeline.vlm.batches.batch import Batch
from pipeline.vlm.batches.packing import packed_length
from pipeline.vlm.batches.sharing import Sharing, branch_layout, no_sharing

MULTIPLE = 8  # of tokens a batch is wide: few shapes, since oneDNN and compilers keep a program for each


def collate(
    table: TokenTable,
    rows: np.ndarray | Sequence[np.ndarray],
    *,
    image_id: int,
    tokens: int,
    sharing: Sharing | None = None,
    pack: int = 0,
) -> Batch:
    """Rows of a token table, or units of rows that `sharing` found, -> one padded batch, a row of it a unit.

    `pack`: token budget of a single row that takes all units, end to end; 0 for a row a unit.
    Raises `PipelineError` naming a row whose images lack their P placeholders.
    """
    units = list(rows[:, None]) if isinstance(rows, np.ndarray) else rows
    sharing = sharing or no_sharing(table.lengths)
    if table.spec["tokens"] != tokens:
        raise PipelineError(
            f"rows hold {table.spec['tokens']} placeholders an image, features have {tokens} patches",
            where=str(table.path),
            remedy="dvc repro tokenize",
            code=ARTEFACT,
        )
    lengths = np.array([sharing.unit_length(unit) for unit in units])
    at_row, at, shape = _places(lengths, pack)
    ids, target, real = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
    branch, position = np.full(shape, -1, np.int16), np.zeros(shape, np.int64)
    document = np.arange(len(units), len(units) + shape[1], dtype=np.int32)[None].repeat(len(ids), 0)
    firsts: list[Row] = []
    for i, unit in enumerate(units):
        prefix, line, begin = int(sharing.prefix[unit[0]]), at_row[i], int(at[i])
        found, start = [table.row(int(number)) for number in unit], begin
        for row in found:
            skip = prefix if start > begin else 0
            ids[line, start : start + len(row.ids) - skip] = row.ids[skip:]
            for first, end in row.spans:
                target[line, start - skip + first : start - skip + end] = True
            start += len(row.ids) - skip
        branch[line, begin:start], position[line, begin:start] = branch_layout([len(row.ids) for row in found], prefix)
        real[line, begin:start], document[line, begin:start] = True, i
        firsts.append(found[0])
    unit_of = np.repeat(np.arange(len(firsts)), [len(row.image_start) for row in firsts])  # [S]
    in_unit = np.concatenate([row.image_start for row in firsts]).astype(np.int64)
    slots = np.concatenate([np.arange(row.slots.start, row.slots.stop) for row in firsts]).astype(np.int64)
    slot_row, slot_start = at_row[unit_of], at[unit_of] + in_unit
    of_row = np.array([unit[0] for unit in units])[unit_of]
    _check_runs(table, of_row, lengths[unit_of], in_unit, ids, slot_row, slot_start, image_id)
    keep = np.zeros_like(target)
    keep[:, :-1] = target[:, 1:]
    laid = pack > 0 or any(len(unit) > 1 for unit in units)
    return Batch(
        ids=torch.from_numpy(ids),
        real=torch.from_numpy(real),
        keep=torch.from_numpy(keep),
        kept=torch.from_numpy(np.flatnonzero(keep)),
        labels=torch.from_numpy(ids[target]),
        slots=slots,
        slot_row=torch.from_numpy(slot_row),
        slot_start=torch.from_numpy(slot_start),
        tokens=int(lengths.sum()),
        branch=torch.from_numpy(branch) if laid else None,
        position=torch.from_numpy(position) if laid else None,
        document=torch.from_numpy(document) if pack else None,
    )


def _places(lengths: np.ndarray, pack: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Row and first column of each unit, and the shape [B, T] they take."""
    if pack:
        return np.zeros(len(lengths), np.int64), np.cumsum(lengths) - lengths, (1, packed_length(int(lengths.sum()), pack))
    shape = len(lengths), -(-int(lengths.max()) // MULTIPLE) * MULTIPLE
    return np.arange(len(lengths)), np.zeros(len(lengths), np.int64), shape


def _check_runs(
    table: TokenTable,
    rows: np.ndarray,
    lengths: np.ndarray,
    in_unit: np.ndarray,
    ids: np.ndarray,
    slot_row: np.ndarray,
    slot_start: np.ndarray,
    image_id: int,
) -> None:
    """For each run [S]: its table row, the length of its unit, where it begins in that and in `ids`."""
    if not len(slot_row):
        return
    tokens = int(table.spec["tokens"])
    offsets = np.arange(tokens)
    inside = (in_unit[:, None] + offsets >= 0) & (in_unit[:, None] + offsets < lengths[:, None])  # [S, P]
    positions = np.clip(slot_start[:, None] + offsets, 0, ids.shape[1] - 1)
    held = (ids[slot_row[:, None], positions] == image_id) & inside
    if not held.all():
        bad = int(np.argmin(held.all(1)))
        raise PipelineError(
            f"an image needs {tokens} placeholders, found {int(held[bad].sum())} at token {in_unit[bad]}",
            where=table.where(int(rows[bad])),
            remedy="dvc repro -f tokenize",
            code=ARTEFACT,
        )
