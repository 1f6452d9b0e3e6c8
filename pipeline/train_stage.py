"""What the two training stages share: put the parts together, train, save, measure on held-out rows.

A stage says which data, which parameters train (`train`), where features come from (`features`) and which checkpoint it
starts from; nothing else differs between them.
"""

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import set_seed

from pipeline import checkpoint
from pipeline.checkpoint import Manifest
from pipeline.dividing import gather
from pipeline.evaluate import answer_accuracy, heldout_loss
from pipeline.files import main_checkout, publish
from pipeline.hardware import pick_device, pick_precision, use_fast_float32
from pipeline.heldout import Heldout
from pipeline.keeper import Keeper
from pipeline.model import (
    VisionLanguageModel,
    freeze,
    frozen_digest,
    hold_frozen_in,
    weights_digest,
)
from pipeline.packing import NAME as PACKED
from pipeline.params import Dataset, StageParams, Training
from pipeline.parts import check_start, choose_attention, choose_sharing, make_builder, make_encoder, make_model, open_sources
from pipeline.planning import Schedule
from pipeline.resume import Resume
from pipeline.sharing import LONGEST, Sharing
from pipeline.sources import FeatureSource, NoFeatures
from pipeline.text import PromptBuilder
from pipeline.tokens import TokenTable
from pipeline.training import MIXED, train
from pipeline.vision import Encoder
from pipeline.watch import watching

TOKENS = Path("data/tokens")


def train_stage(params: StageParams, training: Training, *, dataset: Dataset, name: str, start: Path | None) -> dict[str, Any]:
    """Train on `dataset`, save to models/<name>, return the held-out figures."""
    device = pick_device(params.runtime.device)
    precision = pick_precision(training.precision, device)
    accelerator = Accelerator(mixed_precision=MIXED[precision], cpu=device.type == "cpu")
    use_fast_float32()
    set_seed(training.seed)
    device = accelerator.device  # one a process
    encoder = make_encoder(params, device)
    table, heldout = TokenTable(TOKENS / f"{name}.arrow"), TokenTable(TOKENS / "heldout.arrow", limit=params.evaluate.limit)
    builder = make_builder(params, encoder, table, heldout)
    if start is not None:
        check_start(params, encoder, builder, start)
    model = make_model(params, training, encoder, precision, start)
    sharing = choose_sharing(training, model, table, name, accelerator)
    # on a GPU held-out rows are not packed, and without that a mask costs more than it saves
    heldout_sharing = choose_sharing(training, model, heldout, "heldout", accelerator) if device.type == "cpu" else None
    counts = freeze(model, training.train)
    if halved := training.train == "projector+ends" and precision == "bfloat16":
        hold_frozen_in(model, torch.bfloat16)
    longest = int(max(table.lengths.max(), heldout.lengths.max()))
    shared = sharing is not None or heldout_sharing is not None
    attention = choose_attention(model, device, max(longest, LONGEST) if shared else longest)
    model.language_model.set_attn_implementation(attention)
    accelerator.print(
        f"{name}: {counts['projector']:,} projector and {counts['language_model']:,} language-model parameters train, "
        f"{counts['frozen']:,} are frozen; {len(table):,} rows, features {training.features}, {precision} on {device}",
        flush=True,
    )
    cache = params.runtime.live_cache_mb * 1_000_000
    source, heldout_source = open_sources(training.features, encoder, ((table, dataset), (heldout, params.data.heldout)), cache)
    if training.features == "stored":
        encoder.drop_tower()
    schedule = Schedule(**{key: getattr(training, key) for key in Schedule.__dataclass_fields__})
    model.to(accelerator.device)
    before = frozen_digest(model)
    resume = _resume(params, training, schedule, model, encoder, table, heldout, precision, name, shares=sharing is not None)
    first, runtime = accelerator.is_main_process, params.runtime
    divided = runtime.divided and accelerator.num_processes > 1

    def measure(model: VisionLanguageModel) -> float:
        options = {"micro_tokens": training.micro_tokens, "sharing": heldout_sharing, "even": divided}
        return heldout_loss(model, heldout, heldout_source, accelerator, image_id=builder.image_id, **options)

    every, best = params.evaluate.every, training.keep == "best"
    measured = Heldout(measure, every=every, keep_best=best) if every else None
    keeper = Keeper(resume, minutes=runtime.save_minutes, heldout=measured)
    folder = main_checkout() / ".dvc" / "tmp" / "watch" / name
    with watching(folder, profile=runtime.profile if first else 0, live=runtime.live and first) as watch:
        history = train(
            model,
            table,
            source,
            schedule,
            accelerator,
            image_id=builder.image_id,
            name=name,
            sharing=sharing,
            keeper=keeper,
            heldout=measured,
            watch=watch,
            threads=max(1, runtime.workers),
            divided=divided,
            packed=attention == PACKED,
            compiled=runtime.compile,
        )
    keeper.take_best(model, accelerator)
    if frozen_digest(model) != before or any(p.grad is not None for p in model.parameters() if not p.requires_grad):
        raise AssertionError("a frozen parameter has changed or has a gradient")
    if divided or halved:  # halved: what did not train is saved as it was
        model = gather(model, make_model(params, training, encoder, precision, start))
        model.to(accelerator.device)
        model.language_model.set_attn_implementation(attention)
    if accelerator.is_main_process:
        _save(params, model, encoder, builder, training.train, start, Path("models") / name)
        _write_history(Path("results") / name / "history.csv", history)
        if measured:
            measured.write(Path("results") / name / "heldout.csv")
    figures = _measure(params, training, model, heldout, heldout_source, accelerator, builder, heldout_sharing)
    if accelerator.is_main_process:
        resume.clear()
    accelerator.end_training()
    if measured and measured.keep_best and measured.best:
        figures["best_step"] = measured.best["step"]
    return figures | {
        "train_loss": round(sum(row["loss"] for row in history[-20:]) / len(history[-20:]), 6),
        "steps": len(history),
    }


def _resume(
    params: StageParams,
    training: Training,
    schedule: Schedule,
    model: VisionLanguageModel,
    encoder: Encoder,
    table: TokenTable,
    heldout: TokenTable,
    precision: str,
    name: str,
    *,
    shares: bool,
) -> Resume:
    """A run's key: its numbers, its rows, the encoder and every weight it starts from."""
    depends = {
        "schedule": asdict(schedule),
        "train": training.train,
        "share_images": shares,
        "projector": params.projector.kind,
        "precision": precision,
        "encoder": encoder.spec(),
        "tokens": _file_digest(table.path),
        "weights": weights_digest(model.parameters()),
    }
    if every := params.evaluate.every:
        depends["heldout"] = {"every": every, "keep": training.keep, "rows": len(heldout), "tokens": _file_digest(heldout.path)}
    return Resume(main_checkout() / ".dvc" / "tmp" / "resume", name, depends)


def _file_digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


def _save(
    params: StageParams,
    model: VisionLanguageModel,
    encoder: Encoder,
    builder: PromptBuilder,
    train_: str,
    start: Path | None,
    folder: Path,
) -> None:
    vision, llm = params.vision, params.llm
    manifest = Manifest(
        vision={
            "model": vision.model,
            "revision": vision.revision,
            "layer": vision.layer,
            "precision": vision.precision,
            "spec": encoder.spec(),
        },
        llm={"model": llm.model, "revision": llm.revision, "image_token": llm.image_token},
        projector={"kind": params.projector.kind, "width": encoder.width, "hidden": model.hidden_size},
        own_llm=train_ != "projector" or (start is not None and checkpoint.read_manifest(start).own_llm),
    )
    checkpoint.save(folder, model, manifest, builder)


def _measure(
    params: StageParams,
    training: Training,
    model: VisionLanguageModel,
    table: TokenTable,
    source: FeatureSource,
    accelerator: Accelerator,
    builder: PromptBuilder,
    sharing: Sharing | None,
) -> dict[str, Any]:
    """Held-out loss, accuracy, and the accuracy of the blind control."""
    options: dict[str, Any] = {"image_id": builder.image_id, "micro_tokens": training.micro_tokens, "sharing": sharing}
    loss = heldout_loss(model, table, source, accelerator, **options)
    figures: dict[str, Any] = {"questions": len(table), "loss": round(loss, 6)}
    for suffix, shown in (("", source), ("_blind", NoFeatures(source))):
        score, _ = answer_accuracy(
            model,
            table,
            shown,
            accelerator,
            builder,
            max_new_tokens=params.evaluate.max_new_tokens,
            batch_size=params.runtime.eval_batch,
            blind=bool(suffix),
            name=f"answers{suffix.replace('_', ', ')}",
        )
        figures[f"accuracy{suffix}"] = round(score.accuracy, 6)
    return figures


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    with publish(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
