"""Rows of a token table -> the tensors of one batch: padded to one width, or end to end in one row on GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from pipeline.core import ARTEFACT, PipelineError
from pipeline.text import Row, TokenTable
from pipeline.vlm.batches.packing import packed_length
from pipeline.vlm.batches.sharing import Sharing, branch_layout, no_sharing

MULTIPLE = 8  # of tokens a batch is wide: few shapes, since oneDNN and compilers keep a program for each


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, right-padded. Each of its rows is as a rule one row of the token table, a conversation.

    Conversations about one image may share a row (`share_images`): what they begin with stands there once, then a branch of each.
    On GPUs all may stand end to end in a single row (packed). One such row of conversations is called a unit.

    Attributes:
        ids: int64 [B, T], P placeholders where an image stands. Packed, B is 1 and the row holds all units.
        real: bool [B, T], positions that are not padding (only a mixture's router asks).
        loss_positions: int64 [supervised], places among the B × T whose next token is supervised.
        labels: int64 [supervised], those next tokens, row by row.
        slots: int64 [S], the images in it: their numbers among all image slots of the token table, for a feature source.
        slot_row, slot_start: int64 [S], the row of each and the position of its first placeholder.
        tokens: how many of the B × T positions are no padding.
        branch, position: int16 and int64 [B, T] (see `pipeline.vlm.batches.sharing`); None where no row is shared and none packed.
        document: int32 [B, T], which unit a token is of, where units are packed (see `pipeline.vlm.batches.packing`).
    """

    ids: torch.Tensor
    real: torch.Tensor
    loss_positions: torch.Tensor
    labels: torch.Tensor
    slots: np.ndarray
    slot_row: torch.Tensor
    slot_start: torch.Tensor
    tokens: int
    branch: torch.Tensor | None = None
    position: torch.Tensor | None = None
    document: torch.Tensor | None = None

    @property
    def loss_mask(self) -> torch.Tensor:
        """bool [B, T], true at `loss_positions`."""
        mask = torch.zeros(self.ids.numel(), dtype=torch.bool, device=self.ids.device)
        return mask.index_fill(0, self.loss_positions, True).view(self.ids.shape)

    def to(self, device: torch.device) -> "Batch":
        """The same with its tensors on a device; `slots` stay with the CPU, which looks features up."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: Any = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


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
    _check_patches(table, tokens)
    lengths = np.array([sharing.unit_length(unit) for unit in units])
    at_row, at, shape = _places(lengths, pack)
    arrays, firsts = _Arrays.empty(shape, len(units)), list[Row]()
    for number, unit in enumerate(units):
        found = [table.row(int(row)) for row in unit]
        arrays.write(number, found, int(sharing.prefix[unit[0]]), int(at_row[number]), int(at[number]))
        firsts.append(found[0])
    unit_of = np.repeat(np.arange(len(firsts)), [len(row.image_start) for row in firsts])  # [S]
    in_unit = np.concatenate([row.image_start for row in firsts]).astype(np.int64)
    slot_row, slot_start = at_row[unit_of], at[unit_of] + in_unit
    of_row = np.array([unit[0] for unit in units])[unit_of]
    _check_runs(table, of_row, lengths[unit_of], in_unit, arrays.ids, slot_row, slot_start, image_id)
    loss_mask = np.zeros_like(arrays.target)
    loss_mask[:, :-1] = arrays.target[:, 1:]
    laid = pack > 0 or any(len(unit) > 1 for unit in units)
    return Batch(
        ids=torch.from_numpy(arrays.ids),
        real=torch.from_numpy(arrays.real),
        loss_positions=torch.from_numpy(np.flatnonzero(loss_mask)),
        labels=torch.from_numpy(arrays.ids[arrays.target]),
        slots=np.concatenate([np.arange(row.slots.start, row.slots.stop) for row in firsts]).astype(np.int64),
        slot_row=torch.from_numpy(slot_row),
        slot_start=torch.from_numpy(slot_start),
        tokens=int(lengths.sum()),
        branch=torch.from_numpy(arrays.branch) if laid else None,
        position=torch.from_numpy(arrays.position) if laid else None,
        document=torch.from_numpy(arrays.document) if pack else None,
    )


@dataclass(frozen=True, slots=True)
class _Arrays:
    """What units are written to, [B, T] each: ids, which of them are supervised, which are no padding, and where they belong."""

    ids: np.ndarray
    target: np.ndarray
    real: np.ndarray
    branch: np.ndarray
    position: np.ndarray
    document: np.ndarray

    @staticmethod
    def empty(shape: tuple[int, int], units: int) -> "_Arrays":
        """All padding, each token of which is a document of its own."""
        document = np.arange(units, units + shape[1], dtype=np.int32)[None].repeat(shape[0], 0)
        ids, target, real = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
        return _Arrays(ids, target, real, np.full(shape, -1, np.int16), np.zeros(shape, np.int64), document)

    def write(self, number: int, rows: list[Row], prefix: int, line: int, begin: int) -> None:
        """Unit `number`: rows behind each other from column `begin` on, their common prefix of so many tokens once."""
        start = begin
        for row in rows:
            skip = prefix if start > begin else 0
            self.ids[line, start : start + len(row.ids) - skip] = row.ids[skip:]
            for first, end in row.spans:
                self.target[line, start - skip + first : start - skip + end] = True
            start += len(row.ids) - skip
        here = line, slice(begin, start)
        self.branch[here], self.position[here] = branch_layout([len(row.ids) for row in rows], prefix)
        self.real[here], self.document[here] = True, number


def _check_patches(table: TokenTable, tokens: int) -> None:
    if table.spec["tokens"] != tokens:
        raise PipelineError(
            f"rows hold {table.spec['tokens']} placeholders an image, features have {tokens} patches",
            where=str(table.path),
            remedy="dvc repro tokenize",
            code=ARTEFACT,
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
    """Raises `PipelineError` for the first image without its P placeholders.

    For each run [S] are given: its table row, the length of its unit, where it begins in that and in `ids`.
    """
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
