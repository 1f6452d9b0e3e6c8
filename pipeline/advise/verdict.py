"""From measured seconds to a choice: cached features, or the encoder live."""

import math
from dataclasses import dataclass

from pipeline.check import Rates, Shape, Work, extraction_seconds, live_seconds, stored_seconds
from pipeline.params import Params

LOOKED_AT = 1000  # epochs within which a break-even is worth telling


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
