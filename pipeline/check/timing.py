"""A training stage put together on a sample of its rows and timed: steps of the loop that it runs, and answers to questions."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState

from pipeline.features import NoFeatures
from pipeline.params import Params, StageParams
from pipeline.vlm.evaluation import Answering, answer_questions, find_questions, log_likelihoods
from pipeline.vlm.training import Callbacks, TrainingRun, assemble, train

CPU_FLOPS = 2e11  # floating-point operations a second, about, by which a step's rows are chosen on a CPU
STEP = 2.0  # seconds that a step may take there, about
LEAST = 8  # rows of a step there, where params ask for more


class _EnoughError(Exception):
    """The run has told what was wanted of it."""


@contextmanager
def sampled_run(params: Params, name: str, folder: Path) -> Iterator[TrainingRun]:
    """A stage on the token tables and feature stores of a sample in `folder`; nothing it says is shown."""
    training = getattr(params, name).model_copy(update={"features": "stored"})
    AcceleratorState._reset_state(reset_partial_state=True)  # a stage before may have computed in another precision
    try:
        with redirect_stdout(io.StringIO()):  # of a stage, which this is not
            run = assemble(
                StageParams(params, frozenset(Params.model_fields), "advise"),
                training,
                dataset=getattr(params.data, name),
                name=name,
                start=None,
                data=folder,
            )
        yield run
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def rows_a_visit(run: TrainingRun) -> float:
    """Rows for which a picture's features are asked for once."""
    shared = run.examples.shared
    return shared.rows_a_group if shared else 1.0


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(run: TrainingRun, *, seconds: float) -> float:
    """Seconds of training a row: the stage's own loop over the sample, after a warm-up of at least a step.

    Each of the two lasts one pass over the sample, or `seconds` and the step that is under way then.
    """
    rows = _rows_a_step(run)
    a_pass = len(run.examples.table) // rows
    stamps = [time.perf_counter()]
    warm: list[int] = []

    def on_step(_: dict[str, float]) -> None:
        wait_for(run.accelerator.device)
        stamps.append(time.perf_counter())
        since = warm[0] if warm else 0
        if len(stamps) - 1 - since >= a_pass or stamps[-1] - stamps[since] >= seconds:
            if warm:
                raise _EnoughError
            warm.append(len(stamps) - 1)

    schedule, execution = replace(run.schedule, batch_size=rows, epochs=3), replace(run.execution, name=f"timing {run.name}")
    with suppress(_EnoughError):
        train(run.model, run.examples, schedule, run.accelerator, execution=execution, callbacks=Callbacks(on_step=on_step))
    return (stamps[-1] - stamps[warm[0]]) / (rows * (len(stamps) - 1 - warm[0]))


def _rows_a_step(run: TrainingRun) -> int:
    """A power of two: as many as params ask for, fewer where a CPU would take long."""
    table, most = run.examples.table, run.training.batch_size
    if run.accelerator.device.type == "cpu":
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        most = min(most, max(LEAST, int(CPU_FLOPS * STEP / (4 * parameters * float(table.lengths.mean())))))
    return 1 << (min(most, len(table)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class HeldoutTime:
    """Seconds of measuring: the loss of a row, the answers to a row, and the blind control of as many rows as were asked."""

    loss: float
    answers: float
    blind: float
    repeated: bool  # most questions are the same without their pictures, so that the blind control is as long for any number

    def of(self, rows: int, asked: int) -> float:
        """Of `rows` held-out rows, from a sample of `asked`."""
        return rows * (self.loss + self.answers) + self.blind * (1 if self.repeated else rows / asked)


@torch.inference_mode()
def time_heldout(run: TrainingRun) -> HeldoutTime:
    """What a stage does with held-out rows. Answers are as long as the longest reference at most, as a trained model's are."""
    model, heldout, device = run.model, run.heldout, run.accelerator.device
    questions, budget = find_questions(heldout.table), run.training.micro_tokens
    longest = max((len(question.reference) for question in questions), default=1)
    asking = Answering(min(run.params.evaluate.max_new_tokens, longest), run.params.runtime.eval_batch, budget)
    unseen = replace(heldout, source=NoFeatures(heldout.source))
    stamps = [time.perf_counter()]

    def done() -> None:
        wait_for(device)
        stamps.append(time.perf_counter())

    log_likelihoods(model, heldout, run.accelerator, micro_tokens=budget)
    done()
    answer_questions(model, heldout, run.accelerator, run.builder, asking, questions)
    done()
    answer_questions(model, unseen, run.accelerator, run.builder, replace(asking, blind=True), questions)
    done()
    loss, answers, blind = np.diff(stamps).tolist()
    rows, distinct = max(1, len(heldout.table)), len({question.prompt.tobytes() for question in questions})
    return HeldoutTime(loss / rows, answers / rows, blind, distinct < len(questions) / 2)
