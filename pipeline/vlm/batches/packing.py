"""How long a row is that takes conversations end to end: few lengths, since a kernel is compiled for each."""

import numpy as np

BLOCK = 128
LENGTHS = 4  # that a packed row may have: a kernel is compiled for each


def row_budget(lengths: np.ndarray, batch_size: int, most: int) -> int:
    """Tokens of a packed row: `most`, or less where no step of `batch_size` rows of such lengths [N] has as many."""
    longest = int(np.sort(lengths)[-batch_size:].sum())
    return min(most, -(-longest // (LENGTHS * BLOCK)) * LENGTHS * BLOCK)


def capacity(budget: int) -> int:
    """Most tokens of a packed row: `budget`, in whole steps of its lengths; a block where that is more."""
    step = _step(budget)
    return max(step, budget // step * step)


def packed_length(used: int, budget: int) -> int:
    """Length T of a row that holds `used` tokens: one of few, the tail padded; more than `budget` for a unit that is longer."""
    step, most = _step(budget), capacity(budget)
    if used <= most:
        return -(-used // step) * step
    while most < used:
        most *= 2
    return most


def _step(budget: int) -> int:
    return max(BLOCK, budget // (LENGTHS * BLOCK) * BLOCK)
