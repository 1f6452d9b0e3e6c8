"""Held-out loss and some answers while a run trains: every so many steps and after the last, and which step's was best."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core import NUMERIC, PipelineError, publish, writing
from pipeline.vlm.model import VisionLanguageModel

Row = dict[str, Any]


class Heldout:
    """Measures as a run goes on; what was found is part of the run's saved state (see `pipeline.vlm.training.checkpointing`).

    Args:
        measure: the loss of a model on held-out rows; all processes take part, and all must be given the same.
        every: steps between measurements.
        keep_best: whether the run ends with the weights of its best measurement instead of the last ones.
        answer: the model's answers to some questions, always the same ones.

    Attributes:
        rows: a row a measurement: `step` as the history counts (the first is 0), `loss` after that step, `answers` if any.
    """

    def __init__(
        self,
        measure: Callable[[VisionLanguageModel], float],
        *,
        every: int,
        keep_best: bool = False,
        answer: Callable[[VisionLanguageModel], list[str]] | None = None,
    ) -> None:
        self._measure, self._every, self.keep_best, self._answer = measure, every, keep_best, answer
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
        self.rows.append({"step": step, "loss": loss} | ({"answers": self._answer(model)} if self._answer else {}))
        if show:
            best = " (the best so far)" if self.best == self.rows[-1] else ""
            tqdm.write(f"held-out loss {loss:.4f} after step {step}{best}")

    def write_answers(self, path: Path, questions: list[dict[str, Any]]) -> None:
        """The questions, and how they were answered after which step, as JSON; whole or not at all."""
        answers = [{"step": row["step"], "answers": row["answers"]} for row in self.rows if "answers" in row]
        with publish(path) as temporary, writing(path):
            text = json.dumps({"questions": questions, "measured": answers}, ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def write_losses(path: Path, rows: list[Row]) -> None:
    """Steps and held-out losses as CSV, its head alone where nothing was measured; whole or not at all."""
    with publish(path) as temporary, writing(path), temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["step", "loss"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
