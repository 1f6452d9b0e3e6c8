"""What the two training stages do: put the parts together, train, save, measure on held-out rows.

A stage says which data, which parameters train (`train`), where features come from (`features`) and which checkpoint it
starts from; nothing else differs between them.
"""

import csv
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import NUMERIC, PipelineError, hold, main_checkout, publish, writing
from pipeline.core.trees import is_first_of_tree
from pipeline.features import describe_encoders
from pipeline.params import Dataset, StageParams, Training
from pipeline.vlm.evaluation import Heldout, heldout_loss, log_likelihoods, write_losses
from pipeline.vlm.model import Manifest, VisionLanguageModel, checkpoint, frozen_digest, gather_weights, weights_digest
from pipeline.vlm.training.alike import require_alike
from pipeline.vlm.training.assembly import TrainingRun, assemble
from pipeline.vlm.training.callbacks import Callbacks, step_callback
from pipeline.vlm.training.checkpointing import Checkpointer
from pipeline.vlm.training.divergence import has_diverged
from pipeline.vlm.training.loop import train
from pipeline.vlm.training.measuring import measure_answers
from pipeline.vlm.training.parts import projector_shape
from pipeline.vlm.training.samples import sample_answers, sample_questions, tell_questions
from pipeline.vlm.training.state import TrainingState, locks
from pipeline.vlm.training.tracking import Log, tracked

History = list[dict[str, float]]
WATCH = Path(".dvc/tmp/watch")  # in the main checkout: traces and trackers' files


def train_stage(params: StageParams, training: Training, *, dataset: Dataset, name: str, start: Path | None) -> dict[str, Any]:
    """Train on `dataset`, save to models/<name>, return the held-out figures.

    Raises `PipelineError` with the figures, and writes no model, where the run has diverged.
    """
    run = assemble(params, training, dataset=dataset, name=name, start=start)
    state = _training_state(run)
    require_alike(run.accelerator, state.depends)
    with (
        hold(state.folder.name, locks()) if run.accelerator.is_main_process else nullcontext(),
        tracked(run.accelerator, params.runtime.track, name, main_checkout() / WATCH, asdict(run.schedule)) as log,
    ):
        figures = _train_and_measure(run, state, _heldout_measurements(run), log)
        if log:
            log({key: value for key, value in figures.items() if isinstance(value, int | float)}, figures["steps"])
    run.accelerator.end_training()
    return figures


def _train_and_measure(run: TrainingRun, state: TrainingState, measured: Heldout | None, log: Log | None) -> dict[str, Any]:
    writes, training = is_first_of_tree(), run.training
    history, saved = _train(run, state, measured, log)
    model = _whole_model(run)
    loss, likelihoods = log_likelihoods(model, run.heldout, run.accelerator, micro_tokens=training.micro_tokens)
    made = [row["loss"] for row in history]
    if measured and measured.keep_best and measured.best:
        made = made[: int(measured.best["step"]) + 1]
    diverged = has_diverged(made, loss, model.vocabulary)
    if writes:
        if not diverged:
            _save(run, model)
        _write_curves(run, history, measured)
    figures = measure_answers(run, model, likelihoods) | {"loss": round(loss, 6) if math.isfinite(loss) else None}
    if measured and measured.keep_best and measured.best:
        figures["best_step"] = measured.best["step"]
    last = history[-20:]
    figures |= {"train_loss": round(sum(row["loss"] for row in last) / len(last), 6), "steps": len(history)}
    if diverged:
        raise _diverged(run, figures, loss, made, saved)
    if writes:
        state.clear()
    return figures


def _diverged(run: TrainingRun, figures: dict[str, Any], loss: float, losses: list[float], saved: str) -> PipelineError:
    ends = f"training loss {figures['train_loss']:.3g} and held-out loss {loss:.3g} at the end"
    error = PipelineError(
        f"the run has diverged: {ends}, {losses[0]:.3g} at the start; no model is written",
        where=f"{run.name}.lr {run.training.lr:g}",
        remedy=f"lower {run.name}.lr; {saved}",
        code=NUMERIC,
    )
    error.figures = {**figures, "diverged": True}
    return error


def _training_state(run: TrainingRun) -> TrainingState:
    """Where the run's state is kept; its key is the run's numbers, its rows, the encoder and every weight it starts from."""
    params, training, heldout = run.params, run.training, run.heldout.table
    depends = {
        "schedule": asdict(run.schedule),
        "train": training.train,
        "share_images": run.examples.shared is not None,
        "projector": projector_shape(params),
        "precision": run.precision,
        "encoder": run.encoder.row_spec(),
        "tokens": run.examples.table.digest,
        "weights": weights_digest(run.model.parameters()),
    }
    if every := params.evaluate.every:
        answers = params.evaluate.max_new_tokens
        depends["heldout"] = {
            "every": every, "keep": training.keep, "rows": len(heldout), "tokens": heldout.digest, "answers": answers
        }  # fmt: skip
    return TrainingState(main_checkout() / ".dvc" / "tmp" / "resume", run.name, depends)


def _heldout_measurements(run: TrainingRun) -> Heldout | None:
    """Held-out loss and some answers as the run goes on, where params ask for it."""
    every, micro_tokens = run.params.evaluate.every, run.training.micro_tokens

    def measure(model: VisionLanguageModel) -> float:
        return heldout_loss(model, run.heldout, run.accelerator, micro_tokens=micro_tokens, even=run.sharded)

    if not every:
        return None
    answer = sample_answers(run, sample_questions(run))
    return Heldout(measure, every=every, keep_best=run.training.keep == "best", answer=answer)


def _train(run: TrainingRun, state: TrainingState, measured: Heldout | None, log: Log | None) -> tuple[History, str]:
    """Run the loop; returns its history and which state there is to fall back on.

    Raises AssertionError where something has written to what is frozen.
    """
    model, runtime, first = run.model, run.params.runtime, run.accelerator.is_main_process
    before = frozen_digest(model)
    checkpointer = Checkpointer(state, minutes=runtime.save_minutes, heldout=measured, write=is_first_of_tree())
    with step_callback(main_checkout() / WATCH / run.name, profile=runtime.profile if first else 0, log=log) as on_step:
        callbacks = Callbacks(checkpointer, measured, on_step, log)
        history = train(model, run.examples, run.schedule, run.accelerator, execution=run.execution, callbacks=callbacks)
    checkpointer.take_best(model, run.accelerator)
    if frozen_digest(model) != before or any(p.grad is not None for p in model.parameters() if not p.requires_grad):
        raise AssertionError("a frozen parameter has changed or has a gradient")
    return history, checkpointer.last_good()


def _whole_model(run: TrainingRun) -> VisionLanguageModel:
    """The trained model to save and to measure: gathered where it is sharded, what did not train as it was."""
    if not (run.sharded or run.halved):
        return run.model
    model = gather_weights(run.model, run.untrained())
    model.to(run.accelerator.device)
    model.language_model.set_attn_implementation(run.attention)
    return model


def _save(run: TrainingRun, model: VisionLanguageModel) -> None:
    """The checkpoint to models/<name>."""
    llm = run.params.llm
    manifest = Manifest(
        vision=describe_encoders(run.params.vision, run.encoder),
        llm={"model": llm.model, "revision": llm.revision, "image_token": llm.image_token, **run.frozen_files}
        | ({"date": llm.date} if run.builder.dated else {}),
        projector=projector_shape(run.params) | {"width": run.encoder.width, "hidden": model.hidden_size},
        own_llm=run.own_llm,
    )
    checkpoint.save(Path("models") / run.name, model, manifest, run.builder)


def _write_curves(run: TrainingRun, history: History, measured: Heldout | None) -> None:
    """The history and held-out losses to results/<name>."""
    results = Path("results") / run.name
    table = results / "history.csv"
    with publish(table) as temporary, writing(table), temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    write_losses(results / "heldout.csv", measured.rows if measured else [])
    if measured:
        measured.write_answers(results / "samples.json", tell_questions(run, sample_questions(run)))
