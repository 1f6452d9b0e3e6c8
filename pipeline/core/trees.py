"""Several processes and the work trees they run in: one each machine, or one that all machines share on a common disk.

What a stage writes must be in every work tree once, or the next stage would lack it there.
"""

import os
import uuid
from functools import cache
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object


def processes_here() -> int:
    """How many of the launched processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@cache
def is_first_of_tree() -> bool:
    """Whether this process writes for its work tree, the folder it runs in. All processes have to ask.

    On several machines the first process of each leaves a mark, and of those whose marks can be seen here the first writes.
    """
    state = PartialState()
    if state.num_processes == processes_here() or state.num_processes == 1:
        return bool(state.is_main_process)
    mark = Path(f".glance-{uuid.uuid4().hex}.tmp")
    if state.is_local_main_process:
        mark.touch()
    try:
        marks = gather_object([mark.name if state.is_local_main_process else ""])
        seen = {path.name for path in Path().iterdir()}  # a listing is read anew after a change of one's own
        first = next((rank for rank, name in enumerate(marks) if name in seen), -1)
        state.wait_for_everyone()
    finally:
        mark.unlink(missing_ok=True)
    return first == state.process_index
