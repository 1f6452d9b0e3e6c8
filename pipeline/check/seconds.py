"""From measured seconds of a picture and a row to those of a stage, with cached features and with the encoder live."""

import math
from dataclasses import dataclass

from pipeline.check.costs import PictureTime


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds, as measured.

    Attributes:
        picture: decoded and encoded, as `pipeline.check` times it.
        writing: a row to disk; from_memory, from_disk: a row back, ready for the projector.
    """

    picture: PictureTime
    writing: float
    from_memory: float
    from_disk: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a training stage has to do.

    Attributes:
        rows: of its data set; pictures: distinct ones; fresh: of these the ones that `extract` would encode for it alone.
        visits: times an epoch asks for a picture's features; rows about one picture ask once where they share it.
        kept: pictures whose features `runtime.live_cache_mb` holds.
        step: measured seconds of training a row.
    """

    name: str
    train: str
    rows: int
    pictures: int
    fresh: int
    visits: int
    kept: int
    epochs: int
    step: float


def extraction_seconds(rates: Rates, pictures: int) -> float:
    """Every picture once through the encoder and to disk."""
    return pictures * rates.picture.together(rates.picture.decoding + rates.writing, rates.picture.encoding)


def stored_seconds(rates: Rates, work: Work, epochs: int, *, in_memory: bool) -> float:
    """Epochs on cached features; `in_memory`: the store fits there, where extraction has left it."""
    steps = epochs * work.rows * work.step  # reading from memory is in it
    return steps if in_memory else rates.picture.together(epochs * work.visits * (rates.from_disk - rates.from_memory), steps)


def live_seconds(rates: Rates, work: Work, epochs: int) -> float:
    """Epochs with the encoder live."""
    asked, each = encodings(work, epochs), rates.picture
    return each.together(asked * each.decoding, asked * each.encoding + epochs * work.rows * work.step)


def encodings(work: Work, epochs: int) -> float:
    """Pictures that a live run encodes.

    All pictures once, and again at every later visit that does not find its row among the `kept` last seen. For visits in an
    order drawn anew each epoch that is found with probability c + (1 - c) ln(1 - c), c the share that is kept: others seen in
    between are 1 - (1 - a)(1 - b) of all pictures, a and b even over [0, 1].
    """
    share = min(1.0, work.kept / max(1, work.pictures))
    found = 1.0 if share == 1 else share + (1 - share) * math.log(1 - share)
    again = max(0, epochs * work.visits - work.pictures)
    return min(work.pictures, epochs * work.visits) + again * (1 - found)
