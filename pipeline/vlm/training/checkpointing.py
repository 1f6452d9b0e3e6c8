"""When the state of a training run is saved, and that a signal ends it with its state saved."""

import os
import signal
import threading
import time
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.core import INTERRUPTED, PipelineError
from pipeline.vlm.evaluation import Heldout
from pipeline.vlm.model import VisionLanguageModel
from pipeline.vlm.training.state import TrainingState


class Checkpointer:
    """Saves the state every so many minutes, at the end, when a signal asks the run to stop, and when held-out loss is best.

    `heldout`: its measurements are saved too, and the best state is kept beside the last where it asks for that.
    """

    def __init__(self, resume: TrainingState, *, minutes: float, heldout: Heldout | None = None) -> None:
        self._resume, self._seconds, self._heldout = resume, 60 * minutes, heldout
        self._saved, self._stop = time.monotonic(), False
        self._asked: float | None = None
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
        best = self._best()
        if not (last or self._stop or due or best == len(history)):
            return
        self._resume.save(
            model,
            getattr(optimizer, "optimizer", optimizer),
            history,
            accelerator.scaler,
            heldout=self._heldout.rows if self._heldout else [],
            best=best,
            write=accelerator.is_main_process,
        )
        self._saved = time.monotonic()
        if self._stop and not last:
            raise PipelineError(
                f"stopped after step {len(history)}, state saved", remedy="the same command goes on", code=INTERRUPTED
            )

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
