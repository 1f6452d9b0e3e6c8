"""Which rows of a token table go together in a step, and the tensors they become.

schedule   a run's numbers                        plan       rows of each step, steps cut into micro-batches
sharing    rows that begin with the same image    packing    rows end to end, on GPUs
examples   a table and its feature source          collate    rows -> one `Batch`
loader     a run's micro-batches, made ahead
"""

from pipeline.vlm.batches.collate import Batch
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.loader import BatchLoader, MicroBatch
from pipeline.vlm.batches.packing import BLOCK, row_budget
from pipeline.vlm.batches.plan import split_by_tokens
from pipeline.vlm.batches.schedule import Execution, Schedule
from pipeline.vlm.batches.sharing import LONGEST, PAYS, Sharing, branch_layout, find_sharing

__all__ = [
    "BLOCK",
    "LONGEST",
    "PAYS",
    "Batch",
    "BatchLoader",
    "Examples",
    "Execution",
    "MicroBatch",
    "Schedule",
    "Sharing",
    "branch_layout",
    "find_sharing",
    "row_budget",
    "split_by_tokens",
]
