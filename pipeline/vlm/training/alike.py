"""Processes of several machines train one model: they must have the same inputs and stand at the same step, or would never meet."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.core import ARTEFACT, PipelineError, machine


def require_alike(accelerator: Accelerator, mine: dict[str, Any]) -> None:
    """Raises `PipelineError` in all processes where one has another value than the first; the first that differs is named."""
    if accelerator.num_processes == 1:
        return
    every = gather_object([(machine(), {key: str(value) for key, value in mine.items()})])
    name, first = every[0]
    for other, found in every[1:]:
        if key := next((key for key in first if found.get(key) != first[key]), ""):
            shown = f" ({first[key]} and {found.get(key)})" if max(len(first[key]), len(found.get(key, ""))) < 40 else ""
            raise PipelineError(
                f"the work trees of {name} and {other} differ in {key}{shown}",
                remedy="give all machines the same data, params and models/, and the same .dvc/tmp/resume or none",
                code=ARTEFACT,
            )
