"""Conversations about the same picture: their common beginning is computed once, with a mask that keeps them apart.

Visual question answering has about ten questions a picture, whose patches are most of the tokens. Rows that show the same
images at the same places after the same words share that prefix; what follows is a branch each, which sees the prefix and
itself. Same loss and gradients as rows on their own, to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.text import TokenTable

PAYS = 0.1  # share of the tokens saved from which on `share_images: auto` is on: below, its masks cost about as much
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

    @property
    def saved(self) -> float:
        """Share of all tokens that need no computing where each prefix is computed once."""
        first = np.zeros(int(self.group.max(initial=-1)) + 1, np.int64)
        first[self.group] = self.prefix
        return float(self.prefix.sum(dtype=np.int64) - first.sum()) / max(1, int(self.lengths.sum(dtype=np.int64)))

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


def no_sharing(lengths: np.ndarray) -> Sharing:
    """Every row for itself."""
    return Sharing(np.arange(len(lengths)), np.zeros(len(lengths), np.int32), lengths)


def find_sharing(table: TokenTable) -> Sharing:
    """Rows of a table by their beginning: images, the words before and between them.

    A row whose first supervised token follows its last image at once shares nothing: the position that predicts it would
    belong to all.
    """
    images = np.ascontiguousarray(table.image_hashes()).view("<u8")[:, :2]  # [slots, 2], of SHA-256
    prefix, keys, slot = [np.empty(0, np.int64)], [np.empty((0, 3), np.uint64)], 0
    for ids, spans, starts in table.parts():
        ends = _prefixes(spans, starts, table.spec["tokens"])
        slots = int(starts[0][-1] - starts[0][0])
        key = np.zeros((len(ends), 3), np.uint64)
        key[:, :2] = _digests(ids, ends) + 3 * _digests((starts[0], images[slot : slot + slots]), np.diff(starts[0]))
        alone = np.flatnonzero(ends == 0)
        key[alone] = 0
        key[alone, 2] = sum(map(len, prefix)) + alone + 1  # like no other
        prefix.append(ends)
        keys.append(key)
        slot += slots
    every = np.concatenate(keys)
    _, first, group = np.unique(every, axis=0, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first, kind="stable")] = np.arange(len(first))  # numbered in order of first appearance
    return Sharing(place[group.reshape(-1)], np.concatenate(prefix).astype(np.int32), table.lengths)


def _prefixes(spans: tuple[np.ndarray, np.ndarray], starts: tuple[np.ndarray, np.ndarray], tokens: int) -> np.ndarray:
    """int64 [n]: where each row's last image ends, 0 where it has none or something before that or next is supervised."""
    ends = np.zeros(len(starts[0]) - 1, np.int64)
    shows = np.diff(starts[0]) > 0
    ends[shows] = starts[1][starts[0][1:][shows] - 1] + tokens
    at, values = spans
    begins = values[at[0] : at[-1]][::2]
    if len(begins):
        ends[np.minimum.reduceat(begins, (at[:-1] - at[0]) // 2) <= ends] = 0
    return ends


def _digests(lists: tuple[np.ndarray, np.ndarray], counts: np.ndarray) -> np.ndarray:
    """uint64 [n, 2]: two hashes of the first `counts` [n] values of each list.

    Sums of values times random odd numbers, one for each place, modulo 2**64: 128 bits that a loop over rows would take
    minutes for.
    """
    at = lists[0] - lists[0][0]
    values = lists[1][lists[0][0] : lists[0][-1]] if lists[1].ndim == 1 else lists[1]
    values = values.astype(np.uint64)[:, None] if values.ndim == 1 else values.astype(np.uint64)
    values += np.uint64(1)
    places = np.arange(at[-1]) - np.repeat(at[:-1], np.diff(at))
    factors = np.random.default_rng(0).integers(0, 2**64, (int(places.max(initial=0)) + 1, 2), np.uint64) | np.uint64(1)
    running = np.zeros((len(values) + 1, 2), np.uint64)
    np.cumsum(values * factors[places], axis=0, out=running[1:])
    return running[at[:-1] + counts] - running[at[:-1]]


def branch_layout(lengths: Sequence[int], prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Branch int16 [T] and position int64 [T] of a unit's tokens: 0 is the prefix, a branch counts on from its end."""
    tails = [length - prefix for length in lengths]
    branch = np.repeat(np.arange(len(tails) + 1), [prefix, *tails]).astype(np.int16)
    position = np.concatenate([np.arange(prefix), *(np.arange(prefix, length) for length in lengths)])
    return branch, position
