"""What is called as a run goes on: saving its state, measuring on held-out rows, a profiler trace, figures to a tracker.

None of it changes a result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.vlm.evaluation import Heldout
from pipeline.vlm.training.checkpointing import Checkpointer
from pipeline.vlm.training.tracking import Log

Step = Callable[[dict[str, float]], None]
WARM_UP = 3  # steps that are not looked at: allocators and caches are still filling


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a run calls after its steps.

    Attributes:
        checkpointer: saves the state now and then and brings an interrupted run back; None = a run starts at its beginning.
        heldout: measures on the way.
        on_step: takes each step's figures.
        log: takes other figures and their step.
    """

    checkpointer: Checkpointer | None = None
    heldout: Heldout | None = None
    on_step: Step | None = None
    log: Log | None = None


@contextmanager
def step_callback(folder: Path, *, profile: int, log: Log | None) -> Iterator[Step]:
    """Yields what to call after each step with its figures.

    Args:
        folder: where the trace (`trace.json`, for chrome://tracing or Perfetto) goes; outside DVC's outputs.
        profile: steps to trace, after a few to warm up; 0 for none.
        log: where the figures go, if anywhere.
    """
    tracer = _tracer(folder, profile) if profile else None

    def step(row: dict[str, float]) -> None:
        if tracer is not None:
            tracer.step()
        if log is not None:
            log({name: value for name, value in row.items() if name not in ("step", "epoch")}, int(row["step"]))

    if tracer is not None:
        tracer.start()
    try:
        yield step
    finally:
        if tracer is not None:
            tracer.stop()


def _tracer(folder: Path, steps: int) -> torch.profiler.profile:
    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        print(f"profile: {steps} steps in {folder / 'trace.json'}", flush=True)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write)
