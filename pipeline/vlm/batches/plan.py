"""Which rows make a step, and how a step is cut into micro-batches.

The plan is a pure function of (lengths, batch size, token budget, seed, epoch): no state, so a resumed run sees the
batches it would have seen. A step is a fixed number of rows drawn at random; neighbours of like length make them, so
that little is padding; a step is cut into micro-batches by tokens, padding included.
"""

import numpy as np

from pipeline.vlm.batches.packing import capacity
from pipeline.vlm.batches.sharing import Sharing

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
