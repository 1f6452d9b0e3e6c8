"""A training run's work: its numbers, which rows go through together, in which order, and their tensors made ahead."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from pipeline.ahead import run_ahead
from pipeline.batches import Batch, collate, pack_by_tokens, plan_epoch, split_by_tokens
from pipeline.sharing import Sharing, alone
from pipeline.sources import FeatureSource
from pipeline.tokens import TokenTable


@dataclass(frozen=True, slots=True)
class Schedule:
    """The numbers of a training run (see the sections `pretrain` and `sft` of params.yaml)."""

    epochs: int
    batch_size: int
    micro_tokens: int
    lr: float
    warmup: float
    min_lr: float
    weight_decay: float
    clip_norm: float
    seed: int


@dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch of a step, as this process does it.

    Attributes:
        units: rows, those that share a beginning together (see `pipeline.sharing`).
        share: 1 / supervised tokens of the whole step, of all processes; 0 where a step has too few units for all.
        parts: this process's micro-batches of the step; `last` of them closes it.
    """

    units: list[np.ndarray]
    share: float
    parts: int
    last: bool


def plan_work(
    table: TokenTable,
    schedule: Schedule,
    epoch: int,
    *,
    sharing: Sharing | None = None,
    skip: int = 0,
    rank: int = 0,
    ranks: int = 1,
    even: bool = False,
    packed: bool = False,
) -> Iterator[Work]:
    """The micro-batches of an epoch that fall to one of `ranks` processes, in order, from the epoch's step `skip` on.

    `even`: every process gets as many; where one has less to do, the rest of its pieces do not count. `packed`: units of a
    micro-batch will stand end to end in one row. It decides which go together in a pass, not which make a step.
    """
    split = pack_by_tokens if packed else split_by_tokens
    sharing = sharing or alone(table.lengths)
    shared = sharing if sharing.rows_a_group > 1 else None
    steps = plan_epoch(table.lengths, batch_size=schedule.batch_size, seed=schedule.seed, epoch=epoch, sharing=shared)
    for rows in steps[skip:]:
        every = [split(rows, sharing, schedule.micro_tokens, rank=number, ranks=ranks) for number in range(ranks)]
        parts, share = every[rank], 1.0 / int(table.supervised[rows].sum())
        count = max(map(len, every)) if even else max(1, len(parts))  # every process takes part in every step
        for number in range(count):
            counts = number < len(parts)
            yield Work(parts[number] if counts else [rows[:1]], share if counts else 0.0, count, number == count - 1)


@dataclass(frozen=True, slots=True)
class Planned:
    """A run's micro-batches, made ahead in threads."""

    table: TokenTable
    source: FeatureSource
    schedule: Schedule
    sharing: Sharing
    image_id: int
    threads: int
    even: bool
    packed: bool

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.table) // self.schedule.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.schedule.epochs

    def load(self, epoch: int, done: int, accelerator: Accelerator) -> Iterator[tuple[tuple[Work, Batch], Any]]:
        """What is left of an epoch after `done` steps of the run: each micro-batch's work, its tensors, what its features need."""
        works = plan_work(
            self.table, self.schedule, epoch, sharing=self.sharing, skip=done - epoch * self.steps_per_epoch,
            rank=accelerator.process_index, ranks=accelerator.num_processes, even=self.even, packed=self.packed,
        )  # fmt: skip
        return run_ahead(
            run_ahead(works, self._prepare, depth=self.threads + 1), self._load, depth=self.threads, threads=self.threads
        )

    def _prepare(self, work: Work) -> Batch:
        pack = self.schedule.micro_tokens if self.packed else 0
        batch = collate(self.table, work.units, sharing=self.sharing, image_id=self.image_id, tokens=self.source.tokens, pack=pack)
        self.source.announce(batch.slots)
        return batch

    def _load(self, prepared: tuple[Work, Batch]) -> Any:
        return self.source.load(prepared[1].slots)
