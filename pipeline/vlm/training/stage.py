"""What the two training stages do: put the parts together, train, save, measure on held-out rows.

A stage says which data, which parameters train (`train`), where features come from (`features`) and which checkpoint it
starts from; nothing else differs between them.
"""

import csv
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import xxhash

from pipeline.core import main_checkout, publish
from pipeline.features import NoFeatures
from pipeline.params import Dataset, StageParams, Training
from pipeline.vlm.batches import Execution
from pipeline.vlm.evaluation import Answering, Heldout, answer_accuracy, heldout_loss
from pipeline.vlm.model import PACKED, Manifest, VisionLanguageModel, checkpoint, frozen_digest, gather_weights, weights_digest
from pipeline.vlm.training.assembly import Stage, assemble
from pipeline.vlm.training.callbacks import Callbacks, step_callback
from pipeline.vlm.training.checkpointing import Checkpointer
from pipeline.vlm.training.loop import train
from pipeline.vlm.training.state import TrainingState

History = list[dict[str, float]]


def train_stage(params: StageParams, training: Training, *, dataset: Dataset, name: str, start: Path | None) -> dict[str, Any]:
    """Train on `dataset`, save to models/<name>, return the held-out figures."""
    stage = assemble(params, training, dataset=dataset, name=name, start=start)
    state, measured = _training_state(stage), _heldout_measurements(stage)
    history = _train(stage, state, measured)
    model = _whole_model(stage)
    if stage.accelerator.is_main_process:
        _save(stage, model, history, measured)
    figures = _measure(stage, model)
    if stage.accelerator.is_main_process:
        state.clear()
    stage.accelerator.end_training()
    if measured and measured.keep_best and measured.best:
        figures["best_step"] = measured.best["step"]
    last = history[-20:]
    return figures | {"train_loss": round(sum(row["loss"] for row in last) / len(last), 6), "steps": len(history)}


def _training_state(stage: Stage) -> TrainingState:
    """Where the run's state is kept; its key is the run's numbers, its rows, the encoder and every weight it starts from."""
    params, training, heldout = stage.params, stage.training, stage.heldout.table
    depends = {
        "schedule": asdict(stage.schedule),
        "train": training.train,
        "share_images": stage.examples.shared is not None,
        "projector": params.projector.kind,
        "precision": stage.precision,
        "encoder": stage.encoder.spec(),
        "tokens": _file_digest(stage.examples.table.path),
        "weights": weights_digest(stage.model.parameters()),
    }
    if every := params.evaluate.every:
        depends["heldout"] = {"every": every, "keep": training.keep, "rows": len(heldout), "tokens": _file_digest(heldout.path)}
    return TrainingState(main_checkout() / ".dvc" / "tmp" / "resume", stage.name, depends)


def _file_digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


def _heldout_measurements(stage: Stage) -> Heldout | None:
    """Held-out loss as the run goes on, where params ask for it."""
    every, micro_tokens = stage.params.evaluate.every, stage.training.micro_tokens

    def measure(model: VisionLanguageModel) -> float:
        return heldout_loss(model, stage.heldout, stage.accelerator, micro_tokens=micro_tokens, even=stage.sharded)

    return Heldout(measure, every=every, keep_best=stage.training.keep == "best") if every else None


def _train(stage: Stage, state: TrainingState, measured: Heldout | None) -> History:
    """Run the loop; raises AssertionError where something has written to what is frozen."""
    model, runtime, first = stage.model, stage.params.runtime, stage.accelerator.is_main_process
    before = frozen_digest(model)
    execution = Execution(
        name=stage.name,
        threads=max(1, runtime.workers),
        sharded=stage.sharded,
        packed=stage.attention == PACKED,
        compiled=runtime.compile,
    )
    checkpointer = Checkpointer(state, minutes=runtime.save_minutes, heldout=measured)
    folder = main_checkout() / ".dvc" / "tmp" / "watch" / stage.name
    with step_callback(folder, profile=runtime.profile if first else 0, live=runtime.live and first) as on_step:
        callbacks = Callbacks(checkpointer, measured, on_step)
        history = train(model, stage.examples, stage.schedule, stage.accelerator, execution=execution, callbacks=callbacks)
    checkpointer.take_best(model, stage.accelerator)
    if frozen_digest(model) != before or any(p.grad is not None for p in model.parameters() if not p.requires_grad):
        raise AssertionError("a frozen parameter has changed or has a gradient")
    return history


def _whole_model(stage: Stage) -> VisionLanguageModel:
    """The trained model to save and to measure: gathered where it is sharded, what did not train as it was."""
    if not (stage.sharded or stage.halved):
        return stage.model
    model = gather_weights(stage.model, stage.untrained())
    model.to(stage.accelerator.device)
    model.language_model.set_attn_implementation(stage.attention)
    return model


def _save(stage: Stage, model: VisionLanguageModel, history: History, measured: Heldout | None) -> None:
    """The checkpoint to models/<name>, the history and held-out losses to results/<name>."""
    vision, llm, start = stage.params.vision, stage.params.llm, stage.start
    manifest = Manifest(
        vision={
            "model": vision.model,
            "revision": vision.revision,
            "layer": vision.layer,
            "precision": vision.precision,
            "spec": stage.encoder.spec(),
        },
        llm={"model": llm.model, "revision": llm.revision, "image_token": llm.image_token},
        projector={"kind": stage.params.projector.kind, "width": stage.encoder.width, "hidden": model.hidden_size},
        own_llm=stage.training.train != "projector" or (start is not None and checkpoint.read_manifest(start).own_llm),
    )
    checkpoint.save(Path("models") / stage.name, model, manifest, stage.builder)
    results = Path("results") / stage.name
    with publish(results / "history.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    if measured:
        measured.write(results / "heldout.csv")


def _measure(stage: Stage, model: VisionLanguageModel) -> dict[str, Any]:
    """Held-out loss, accuracy, and the accuracy of the blind control."""
    heldout, params = stage.heldout, stage.params
    loss = heldout_loss(model, heldout, stage.accelerator, micro_tokens=stage.training.micro_tokens)
    figures: dict[str, Any] = {"questions": len(heldout.table), "loss": round(loss, 6)}
    asking = Answering(params.evaluate.max_new_tokens, params.runtime.eval_batch)
    unseen = replace(heldout, source=NoFeatures(heldout.source))
    for name, examples, how in (("accuracy", heldout, asking), ("accuracy_blind", unseen, replace(asking, blind=True))):
        score, _ = answer_accuracy(model, examples, stage.accelerator, stage.builder, how)
        figures[name] = round(score.accuracy, 6)
    return figures
