"""Counts that stay small whatever is counted: a set of digests, a spread of whole numbers, the bad rows with their reasons."""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from pipeline.records import BadRow

LISTED = 100  # bad rows kept with their reason, for the page; the terminal shows ten
KINDS = 40  # kinds of reasons counted apart
HIGHEST = 1 << 16  # numbers up to here are counted one by one
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


class Keys:
    """A set of 64-bit digests in a few sorted arrays: 8 bytes each, where a Python set takes about 80.

    Of 1.3 million digests two are the same with a probability of 5e-8; a count may then be one too small.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of uint64 [n] are in it: bool [n]."""
        found = np.zeros(len(keys), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[at] == keys
        return found

    def add(self, keys: np.ndarray) -> int:
        """Put uint64 [n] in; returns how many were new."""
        keys = np.unique(keys)
        fresh = keys[~self.has(keys)]
        if len(fresh):
            self._runs.append(fresh)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):  # each digest moves a few times in all
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
        return len(fresh)

    def sorted(self) -> np.ndarray:
        """All of them, uint64 [len], ascending."""
        return np.sort(np.concatenate([np.empty(0, np.uint64), *self._runs]))


class Spread:
    """Whole numbers counted one by one up to `HIGHEST`, so that any quantile is exact; larger ones count as larger."""

    def __init__(self) -> None:
        self._counts = np.zeros(256, np.int64)
        self.count = self.sum = self.largest = 0
        self.smallest: int | None = None

    def add(self, values: list[int]) -> None:
        if not values:
            return
        kept = np.minimum(np.array(values, np.int64), HIGHEST)
        counts = np.bincount(kept)
        if len(counts) > len(self._counts):
            self._counts = np.pad(self._counts, (0, max(len(counts), 2 * len(self._counts)) - len(self._counts)))
        self._counts[: len(counts)] += counts
        self.count += len(values)
        self.sum += sum(values)
        self.largest = max(self.largest, *values)
        self.smallest = min(values) if self.smallest is None else min(self.smallest, *values)

    def quantile(self, share: float) -> int:
        """The smallest number that at least `share` of all do not exceed; 0 where there are none."""
        if not self.count:
            return 0
        at = int(np.searchsorted(np.cumsum(self._counts), max(1, share * self.count)))
        return min(at, self.largest) if at < HIGHEST else self.largest

    def above(self, limit: int) -> int:
        """How many are larger than `limit`, which is below `HIGHEST`."""
        return int(self._counts[min(limit, HIGHEST - 1) + 1 :].sum())

    def bins(self, most: int = 12) -> Iterator[tuple[int, int, int]]:
        """(first, last, how many) of at most `most` + 1 bins of one round width; the last takes the rest of a long tail."""
        low, high = self.smallest or 0, self.quantile(0.995)
        width = _round_width((high - low + 1) / most)
        start = low // width * width
        while start <= high:
            yield start, start + width - 1, int(self._counts[start : start + width].sum())
            start += width
        if self.largest >= start:
            yield start, self.largest, int(self._counts[start:].sum())


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10


class BadRows:
    """All bad rows counted, the first hundred kept, and how many there are of each kind of reason."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[BadRow] = []
        self.kinds: Counter[str] = Counter()
        self.cut_short: list[str] = []  # files whose end cannot be read

    def add(self, row: BadRow) -> None:
        self.count += row.rows
        if len(self.first) < LISTED:
            self.first.append(row)
        if row.ends_file and len(self.cut_short) < LISTED:
            self.cut_short.append(row.file)
        kind = _DETAIL.sub("…", row.reason)[:120]
        self.kinds[kind if kind in self.kinds or len(self.kinds) < KINDS else "other reasons"] += row.rows
