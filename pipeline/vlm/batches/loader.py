"""A training run's micro-batches in the order that its schedule gives, their tensors and features made ahead in threads."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from pipeline.core import prefetch
from pipeline.text import TokenTable
from pipeline.vlm.batches.collate import Batch
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.plan import pack_by_tokens, plan_epoch, split_by_tokens
from pipeline.vlm.batches.schedule import Execution, Schedule
from pipeline.vlm.batches.sharing import Sharing, no_sharing


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A part of a step that this process computes in one pass.

    Attributes:
        units: rows of the token table, those that share a beginning together (see `pipeline.vlm.batches.sharing`).
        weight: what its summed loss counts: 1 / supervised tokens of the whole step, of all processes; 0 where a step has
            too few units for all.
        parts: this process's micro-batches of the step; `last` of them closes it.
    """

    units: list[np.ndarray]
    weight: float
    parts: int
    last: bool


def plan_micro_batches(
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
) -> Iterator[MicroBatch]:
    """The micro-batches of an epoch that fall to one of `ranks` processes, in order, from the epoch's step `skip` on.

    `even`: every process gets as many; where one has less to do, the rest of its pieces do not count. `packed`: units of a
    micro-batch will stand end to end in one row. It decides which go together in a pass, not which make a step.
    """
    split = pack_by_tokens if packed else split_by_tokens
    sharing = sharing or no_sharing(table.lengths)
    shared = sharing if sharing.rows_a_group > 1 else None
    steps = plan_epoch(table.lengths, batch_size=schedule.batch_size, seed=schedule.seed, epoch=epoch, sharing=shared)
    for rows in steps[skip:]:
        every = [split(rows, sharing, schedule.micro_tokens, rank=number, ranks=ranks) for number in range(ranks)]
        parts, weight = every[rank], 1.0 / int(table.supervised[rows].sum())
        count = max(map(len, every)) if even else max(1, len(parts))  # every process takes part in every step
        for number in range(count):
            counts = number < len(parts)
            yield MicroBatch(parts[number] if counts else [rows[:1]], weight if counts else 0.0, count, number == count - 1)


@dataclass(frozen=True, slots=True)
class BatchLoader:
    """A run's micro-batches, made ahead in threads."""

    examples: Examples
    schedule: Schedule
    execution: Execution

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples.table) // self.schedule.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.schedule.epochs

    def load(self, epoch: int, done: int, accelerator: Accelerator) -> Generator[tuple[tuple[MicroBatch, Batch], Any], Any, None]:
        """What is left of an epoch after `done` steps of the run: each micro-batch, its tensors, and what its features need.

        To be closed by who takes them (see `prefetch`).
        """
        examples, execution, threads = self.examples, self.execution, self.execution.threads
        planned = plan_micro_batches(
            examples.table, self.schedule, epoch, sharing=examples.sharing, skip=done - epoch * self.steps_per_epoch,
            rank=accelerator.process_index, ranks=accelerator.num_processes, even=execution.sharded, packed=execution.packed,
        )  # fmt: skip
        collated = prefetch(planned, self._collate, depth=threads + 1, where=self._where)
        return prefetch(collated, self._load, depth=threads, threads=threads, where=lambda job: self._where(job[0]))

    def _where(self, micro: MicroBatch) -> str:
        return self.examples.table.where(int(micro.units[0][0]))

    def _collate(self, micro: MicroBatch) -> Batch:
        """Its tensors, having told the feature source which images come next."""
        batch = self.examples.collate(micro.units, pack=self.schedule.micro_tokens if self.execution.packed else 0)
        self.examples.source.announce(batch.slots)
        return batch

    def _load(self, collated: tuple[MicroBatch, Batch]) -> Any:
        return self.examples.source.load(collated[1].slots)
