"""Held-out loss while a run trains: every so many steps and after the last, and which step's was best."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from pipeline.core import NUMERIC, PipelineError, publish, writing
from pipeline.vlm.model import VisionLanguageModel

Row = dict[str, float]


class Heldout:
    """Measures as a run goes on; what was found is part of the run's saved state (see `pipeline.vlm.training.checkpointing`).

    Args:
        measure: the loss of a model on held-out rows; all processes take part, and all must be given the same.
        every: steps between measurements.
        keep_best: whether the run ends with the weights of its best measurement instead of the last ones.

    Attributes:
        rows: a row a measurement: `step` as the history counts (the first is 0), `loss` after that step.
    """

    def __init__(self, measure: Callable[[VisionLanguageModel], float], *, every: int, keep_best: bool = False) -> None:
        self._measure, self._every, self.keep_best = measure, every, keep_best
        self.rows: list[Row] = []

    @property
    def best(self) -> Row | None:
        """The measurement with the lowest loss, the first of equals; None before there is one."""
        return min(self.rows, key=lambda row: row["loss"], default=None)

    def is_due(self, made: int, *, last: bool) -> bool:
        """Whether to measure after so many steps."""
        return last or made % self._every == 0

    def measure(self, model: VisionLanguageModel, step: int, *, show: bool) -> None:
        """Add a row; raises `PipelineError` for a loss that is not finite. Leaves the model in evaluation mode."""
        loss = self._measure(model)
        if not math.isfinite(loss):
            raise PipelineError(
                f"held-out loss {loss:g} after step {step}", remedy="lower lr or set precision: float32", code=NUMERIC
            )
        self.rows.append({"step": step, "loss": loss})
        if show:
            best = " (the best so far)" if self.best == self.rows[-1] else ""
            tqdm.write(f"held-out loss {loss:.4f} after step {step}{best}")

    def write(self, path: Path) -> None:
        """The rows as CSV, whole or not at all."""
        with publish(path) as temporary, writing(path), temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["step", "loss"])
            writer.writeheader()
            writer.writerows(self.rows)
