"""Conversations about the same picture: their common beginning is computed once, with a mask that keeps them apart.

Visual question answering has about ten questions a picture, whose patches are most of the tokens. Rows that show the same
images at the same places after the same words share that prefix; what follows is a branch each, which sees the prefix and
itself. Same loss and gradients as rows on their own, to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from transformers import PretrainedConfig

from pipeline.tokens import TokenTable

LONGEST = 1024  # tokens of a shared row, unless a single conversation is longer: its attention grows with the square


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which rows of a token table begin alike.

    Attributes:
        group: int64 [N], equal for rows with the same prefix.
        prefix: int32 [N], tokens of that prefix; 0 where a row shares nothing.
        lengths: int32 [N], tokens of the whole row.
    """

    group: np.ndarray
    prefix: np.ndarray
    lengths: np.ndarray

    @property
    def rows_a_group(self) -> float:
        """Mean number of rows that share a prefix."""
        return len(self.group) / max(1, int(self.group.max(initial=-1)) + 1)

    def units(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows cut into runs that share a prefix, each within LONGEST tokens (or one row)."""
        rows = rows[np.argsort(self.group[rows], kind="stable")]
        units: list[list[int]] = []
        size, last = 0, -1
        for row, group, length, prefix in zip(
            rows.tolist(), self.group[rows].tolist(), self.lengths[rows].tolist(), self.prefix[rows].tolist(), strict=True
        ):
            if group == last and prefix and size + length - prefix <= LONGEST:
                units[-1].append(row)
                size += length - prefix
            else:
                units.append([row])
                size, last = length, group
        return [np.array(unit) for unit in units]

    def unit_length(self, unit: np.ndarray) -> int:
        """Tokens that a unit takes."""
        return int(self.lengths[unit].sum() - (len(unit) - 1) * self.prefix[unit[0]])


def alone(lengths: np.ndarray) -> Sharing:
    """Every row for itself."""
    return Sharing(np.arange(len(lengths)), np.zeros(len(lengths), np.int32), lengths)


def find_sharing(table: TokenTable) -> Sharing:
    """Rows of a table by their beginning: images, the words before and between them.

    A row whose first supervised token follows its last image at once shares nothing: the position that predicts it would
    belong to all.
    """
    patches, hashes = table.spec["tokens"], table.image_hashes()
    seen: dict[bytes, int] = {}
    group, prefix = np.empty(len(table), np.int64), np.zeros(len(table), np.int32)
    for number in range(len(table)):
        row = table.row(number)
        end = int(row.image_start[-1]) + patches if len(row.image_start) else 0
        if not end or int(row.spans[:, 0].min()) <= end:
            key = number.to_bytes(8, "little")
        else:
            prefix[number] = end
            key = xxhash.xxh3_128_digest(row.ids[:end].tobytes() + hashes[row.slots.start : row.slots.stop].tobytes())
        group[number] = seen.setdefault(key, len(seen))
    return Sharing(group, prefix, table.lengths)


def lay_out(lengths: Sequence[int], prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Branch int16 [T] and position int64 [T] of a unit's tokens: 0 is the prefix, a branch counts on from its end."""
    tails = [length - prefix for length in lengths]
    branch = np.repeat(np.arange(len(tails) + 1), [prefix, *tails]).astype(np.int16)
    position = np.concatenate([np.arange(prefix), *(np.arange(prefix, length) for length in lengths)])
    return branch, position


def branch_mask(branch: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T], true where a token sees another: an earlier one of the prefix or of its own branch [B, T]."""
    order = torch.arange(branch.shape[1], device=branch.device)
    query, key = branch[:, :, None], branch[:, None, :]
    return ((order[:, None] >= order[None]) & ((query == key) | (key == 0)))[:, None]


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that a language model's attention looks back, or None where it sees all: only then masks are ours to make."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
