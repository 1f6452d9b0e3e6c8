"""Whether a run has diverged: its loss stays far above where it began, or the model knows less than one that guesses.

Losses rise for a while in sound runs too: as the rate warms up, after a restart, from a model that starts near its best. So
a run is told that it may be lost only when every loss of a long stretch is far above the first ones, is never stopped for it,
and is judged at its end, when the learning rate has come down.
"""

import math
from collections.abc import Sequence

NOTICED = 50  # losses in a row that are worth a word
AT_THE_END = 20  # losses in a row that decide, at the end


def limit(start: float) -> float:
    """What no loss of a sound run stays above: the first one, which no update had spoilt, and half as much again, or a nat."""
    return start + max(1.0, start / 2)


def stays_above(losses: Sequence[float], count: int) -> bool:
    """Whether each of the last `count` losses is above the limit."""
    return len(losses) > count and min(losses[-count:]) > limit(losses[0])


def has_diverged(losses: Sequence[float], heldout: float, vocabulary: int) -> bool:
    """Whether what a run ends with is no model; `heldout` is its loss on rows it never saw.

    Guessing every token of the vocabulary alike costs ln V. A short run that is worse, and far worse than it began, is lost too.
    """
    if not math.isfinite(heldout):
        return True
    return stays_above(losses, AT_THE_END) or heldout > max(math.log(vocabulary), limit(losses[0]))
