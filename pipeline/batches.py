"""Which rows go together, and how they become tensors.

The plan is a pure function of (lengths, batch size, token budget, seed, epoch): no state, so a resumed run sees the
batches it would have seen. A step is a fixed number of rows drawn at random; neighbours of like length make them, so
that little is padding; a step is cut into micro-batches by tokens, padding included. On GPUs a micro-batch is one row, its
conversations end to end (see `pipeline.packing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.errors import ARTEFACT, PipelineError
from pipeline.packing import capacity, packed_length
from pipeline.sharing import Sharing, alone, lay_out
from pipeline.tokens import Row, TokenTable

MULTIPLE = 8  # of tokens a batch is wide: few shapes, since oneDNN and compilers keep a program for each
MEGABATCH = 50  # steps' worth of rows that are sorted by length together


def plan_epoch(lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int, sharing: Sharing | None = None) -> list[np.ndarray]:
    """Row numbers of each optimiser step of an epoch: every row exactly once, in an order that follows from the seed.

    Rows are shuffled, cut into megabatches, sorted by length within them and cut into steps, whose order is shuffled.
    This is the usual length grouping: the same mathematics in another order of stochastic gradient descent. With
    `sharing`, rows that begin alike stay together, and it is groups of them that are shuffled and sorted.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    sizes = lengths
    if sharing is not None:
        place = rng.permutation(int(sharing.group.max(initial=-1)) + 1)
        order = np.argsort(place[sharing.group], kind="stable")
        sizes = np.bincount(sharing.group, lengths - sharing.prefix)[sharing.group] + sharing.prefix
    steps: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * MEGABATCH):
        rows = order[start : start + batch_size * MEGABATCH]
        if sharing is None:
            rows = rows[np.argsort(sizes[rows], kind="stable")]
        else:
            rows = rows[np.lexsort((place[sharing.group[rows]], sizes[rows]))]
        steps += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [steps[number] for number in rng.permutation(len(steps))]


def split_by_tokens(rows: np.ndarray, sharing: Sharing, budget: int, *, rank: int = 0, ranks: int = 1) -> list[list[np.ndarray]]:
    """Cut rows into micro-batches of units, whose padded size (longest × count) stays within `budget` tokens.

    A unit is a row, or rows that share a prefix; a longer one goes alone. Of several ranks each takes every `ranks`-th
    unit, longest first, so that all have about the same to do.
    """
    units = sharing.units(rows)
    lengths = np.array([sharing.unit_length(unit) for unit in units])
    order = np.argsort(-lengths, kind="stable")[rank::ranks]
    parts, start = [], 0
    while start < len(order):
        count = max(1, budget // int(lengths[order[start]]))  # the first unit is the longest
        parts.append([units[number] for number in order[start : start + count]])
        start += count
    return parts


def pack_by_tokens(rows: np.ndarray, sharing: Sharing, budget: int, *, rank: int = 0, ranks: int = 1) -> list[list[np.ndarray]]:
    """As `split_by_tokens`, for units that stand end to end: so many that their tokens together stay within `budget`.

    Longest first, each goes where it first fits, so that few rows are begun and only the last has much room left.
    """
    units = sharing.units(rows)
    lengths = np.array([sharing.unit_length(unit) for unit in units])
    parts: list[list[np.ndarray]] = []
    room = np.zeros(len(units), np.int64)
    for number in np.argsort(-lengths, kind="stable")[rank::ranks].tolist():
        fits = np.flatnonzero(room[: len(parts)] >= lengths[number])
        if not len(fits):
            fits = np.array([len(parts)])
            parts.append([])
            room[fits[0]] = capacity(budget)
        parts[fits[0]].append(units[number])
        room[fits[0]] -= lengths[number]
    return parts


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
        branch, position: int16 and int64 [B, T] (see `pipeline.sharing`); None where no row is shared and none packed.
        document: int32 [B, T], which unit a token is of, where units are packed (see `pipeline.packing`).
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
    sharing = sharing or alone(table.lengths)
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
        branch[line, begin:start], position[line, begin:start] = lay_out([len(row.ids) for row in found], prefix)
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
