"""From measured seconds to a run's: with cached features, and with the encoder live."""

import math
from dataclasses import dataclass

from pipeline.check import PictureTime, Shape
from pipeline.params import Params

LOOKED_AT = 1000  # epochs within which a break-even is worth telling


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


@dataclass(frozen=True, slots=True)
class Choice:
    """A stage's seconds, both ways.

    Attributes:
        extract: once, for all runs; stored: a run on cached features; live: a run with the encoder live.
        ahead_from: epochs of a single run from which on extracting first is no slower; None: never, or not within `LOOKED_AT`.
    """

    extract: float
    stored: float
    live: float
    ahead_from: int | None

    @property
    def pays(self) -> bool:
        """Whether one run with its extraction is faster than one run live."""
        return self.extract + self.stored <= self.live

    @property
    def runs(self) -> int | None:
        """Runs, experiments on the same pictures, after which the cache is ahead; None where a run gains nothing."""
        gain = self.live - self.stored
        return max(1, math.ceil(self.extract / gain)) if gain > 0 else None


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


def choose(rates: Rates, work: Work, *, in_memory: bool) -> Choice:
    """Both ways of a stage."""
    extract = extraction_seconds(rates, work.fresh)

    def ahead(epochs: int) -> bool:
        return extract + stored_seconds(rates, work, epochs, in_memory=in_memory) <= live_seconds(rates, work, epochs)

    return Choice(
        extract=extract,
        stored=stored_seconds(rates, work, work.epochs, in_memory=in_memory),
        live=live_seconds(rates, work, work.epochs),
        ahead_from=next((epochs for epochs in range(1, LOOKED_AT + 1) if ahead(epochs)), None),
    )


@dataclass(frozen=True, slots=True)
class Advice:
    """What was measured and what follows.

    Attributes:
        pictures: distinct ones of data.pretrain; memory: bytes of it that are free; free: of the disk that features go to.
        work, choices: of each training stage.
    """

    params: Params
    device: str
    shape: Shape
    rates: Rates
    pictures: int
    memory: int
    free: int
    work: list[Work]
    choices: list[Choice]

    @property
    def disk(self) -> int:
        """Bytes of all features."""
        return self.pictures * self.shape.row
