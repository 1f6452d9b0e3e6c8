"""When the state of a training run is saved, and that a signal ends it with its state saved."""

import os
import signal
import sys
import threading
import time
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from pipeline.core import INTERRUPTED, PipelineError
from pipeline.vlm.evaluation import Heldout
from pipeline.vlm.model import VisionLanguageModel
from pipeline.vlm.training.divergence import NOTICED, limit, stays_above
from pipeline.vlm.training.state import TrainingState


class Checkpointer:
    """Saves the state every so many minutes, at the end, when a signal asks the run to stop, and when held-out loss is best.

    `write`: whether this process writes the state; None: the first of all does. `heldout`: its measurements are saved too, and
    the best state is kept beside the last where it asks for that.
    """

    def __init__(self, resume: TrainingState, *, minutes: float, heldout: Heldout | None = None, write: bool | None = None) -> None:
        self._resume, self._seconds, self._heldout = resume, 60 * minutes, heldout
        self._saved, self._stop = time.monotonic(), False
        self._asked: float | None = None
        self._good: int | None = None
        self._told = False
        self._write = write
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self) -> None:
        """Signals mean again what they meant before: there is no more to save."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask_to_stop(self, number: int, _frame: object) -> None:
        """The first signal asks; a second one ends at once, but not one of the several that a dying parent's threads send."""
        if self._asked is None:
            self._stop, self._asked = True, time.monotonic()
        elif time.monotonic() - self._asked > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def start(self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, scaler: Any) -> list[dict[str, float]]:
        """The history of the state that was brought back, empty for a fresh run."""
        history, measured = self._resume.load(model, optimizer, scaler)
        if history:
            self._good = max((n for n in self._resume.saved() if n <= len(history) and _is_good(history[:n])), default=None)
        if self._heldout:
            self._heldout.rows = measured
        if history and os.environ.get("RANK", "0") == "0":
            print(f"resume: going on after step {len(history)}", flush=True)
        return history

    def after_step(
        self,
        model: VisionLanguageModel,
        optimizer: Any,
        history: list[dict[str, float]],
        accelerator: Accelerator,
        *,
        last: bool,
    ) -> None:
        """Save when it is time; raises `PipelineError` when the run was asked to stop. All processes decide alike."""
        due = time.monotonic() - self._saved >= self._seconds
        if accelerator.num_processes > 1:
            asked = torch.tensor([due, self._stop], dtype=torch.float32, device=accelerator.device)
            due, self._stop = (bool(flag) for flag in accelerator.reduce(asked, "sum"))
        self._tell(history, show=accelerator.is_main_process)
        best = self._best()
        if not (last or self._stop or due or best == len(history)):
            return
        self._resume.save(
            model,
            getattr(optimizer, "optimizer", optimizer),
            history,
            accelerator.scaler,
            heldout=self._heldout.rows if self._heldout else [],
            keep=[steps for steps in (best, None if _is_good(history) else self._good) if steps is not None],
            write=accelerator.is_main_process if self._write is None else self._write,
        )
        if _is_good(history):
            self._good = len(history)
        self._saved = time.monotonic()
        if self._stop and not last:
            raise PipelineError(
                f"stopped after step {len(history)}, state saved", remedy="the same command goes on", code=INTERRUPTED
            )

    def last_good(self) -> str:
        """Where the newest state lies that was saved while the loss was as it should be, for a message."""
        if self._good is None:
            return "no state was saved before"
        return f"last good state: after step {self._good}, {self._resume.at(self._good)}"

    def _tell(self, history: list[dict[str, float]], *, show: bool) -> None:
        losses = [row["loss"] for row in history[:1] + history[max(1, len(history) - NOTICED) :]]
        if self._told or not stays_above(losses, NOTICED):
            return
        self._told = True
        if show:
            what = f"the loss, {losses[0]:.3g} at the start, has been above {limit(losses[0]):.3g} for {NOTICED} steps"
            remedy = f"lower {self._resume.stage}.lr; {self.last_good()}"
            tqdm.write(f"{self._resume.stage}: has the run diverged? {what}, now {losses[-1]:.3g} -> {remedy}", file=sys.stderr)

    def take_best(self, model: VisionLanguageModel, accelerator: Accelerator) -> None:
        """Give a model whose run is finished the weights of its best measurement, where those are to be kept."""
        best = self._best()
        if best is not None:
            accelerator.wait_for_everyone()  # the first process may still be writing it
            self._resume.take(model, best)

    def _best(self) -> int | None:
        """Steps that the best state has made, None where only the last is kept."""
        if self._heldout is None or not self._heldout.keep_best or self._heldout.best is None:
            return None
        return int(self._heldout.best["step"]) + 1


def _is_good(history: list[dict[str, float]]) -> bool:
    return history[-1]["loss"] <= limit(history[0]["loss"])
