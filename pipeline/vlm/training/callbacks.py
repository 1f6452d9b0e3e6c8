"""What is called as a run goes on: saving its state, measuring held-out loss, a profiler trace, DVCLive's stream of figures.

None of it changes a result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.core import PipelineError
from pipeline.vlm.evaluation import Heldout
from pipeline.vlm.training.checkpointing import Checkpointer

Step = Callable[[dict[str, float]], None]
WARM_UP = 3  # steps that are not looked at: allocators and caches are still filling


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a run calls after its steps.

    Attributes:
        checkpointer: saves the state now and then and brings an interrupted run back; None = a run starts at its beginning.
        heldout: measures on the way.
        on_step: takes each step's figures.
    """

    checkpointer: Checkpointer | None = None
    heldout: Heldout | None = None
    on_step: Step | None = None


@contextmanager
def step_callback(folder: Path, *, profile: int, live: bool) -> Iterator[Step]:
    """Yields what to call after each step with its figures.

    Args:
        folder: where the trace (`trace.json`, for chrome://tracing or Perfetto) and the stream go; outside DVC's outputs.
        profile: steps to trace, after a few to warm up; 0 for none.
        live: stream the figures through DVCLive.
    """
    stream = _stream(folder) if live else None
    tracer = _tracer(folder, profile) if profile else None

    def step(row: dict[str, float]) -> None:
        if tracer is not None:
            tracer.step()
        if stream is not None:
            for key in ("loss", "lr", "grad_norm"):
                stream.log_metric(key, row[key])
            stream.next_step()

    if tracer is not None:
        tracer.start()
    try:
        yield step
    finally:
        if tracer is not None:
            tracer.stop()
        if stream is not None:
            stream.end()


def _stream(folder: Path) -> Any:
    try:
        from dvclive import Live
    except ImportError:
        raise PipelineError("DVCLive is not installed", where="runtime.live", remedy="pip install 'glance-vlm[live]'") from None
    return Live(dir=str(folder), dvcyaml=None, save_dvc_exp=False, report=None)


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
