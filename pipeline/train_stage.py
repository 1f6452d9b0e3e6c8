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
from pipeline.datasets import open_dataset
from pipeline.dividing import gather
from pipeline.errors import ARTEFACT, PipelineError
from pipeline.evaluate import answer_accuracy, heldout_loss
from pipeline.features import FeatureStore
from pipeline.files import main_checkout, publish
from pipeline.hardware import pick_attention, pick_device, pick_precision, use_fast_float32
from pipeline.model import (
    VisionLanguageModel,
    build_projector,
    freeze,
    frozen_digest,
    hidden_size,
    load_language_model,
    weights_digest,
)
from pipeline.params import Dataset, StageParams, Training
from pipeline.resume import Resume
from pipeline.sharing import LONGEST, Sharing, find_sharing
from pipeline.sources import FeatureSource, LiveFeatures, NoFeatures, StoredFeatures
from pipeline.text import PromptBuilder
from pipeline.tokens import TokenTable
from pipeline.training import MIXED, Keeper, Schedule, train
from pipeline.vision import Encoder
from pipeline.watch import watching

TOKENS, FEATURES = Path("data/tokens"), Path("data/features")


def train_stage(params: StageParams, training: Training, *, dataset: Dataset, name: str, start: Path | None) -> dict[str, Any]:
    """Train on `dataset`, save to models/<name>, return the held-out figures."""
    device = pick_device(params.runtime.device)
    precision = pick_precision(training.precision, device)
    accelerator = Accelerator(mixed_precision=MIXED[precision], cpu=device.type == "cpu")
    use_fast_float32()
    set_seed(training.seed)
    device = accelerator.device  # one a process
    encoder = _encoder(params, device)
    table, heldout = TokenTable(TOKENS / f"{name}.arrow"), TokenTable(TOKENS / "heldout.arrow", limit=params.evaluate.limit)
    builder = _builder(params, encoder, table, heldout)
    model = _model(params, training, encoder, precision, start)
    sharing = _sharing(training, model, table, name, accelerator)
    family = model.language_model.config.model_type
    longest = int(max(table.lengths.max(), heldout.lengths.max()))
    attention = pick_attention(device, longest if sharing is None else max(longest, LONGEST), family)
    model.language_model.set_attn_implementation(attention)
    counts = freeze(model, training.train)
    accelerator.print(
        f"{name}: {counts['projector']:,} projector and {counts['language_model']:,} language-model parameters train, "
        f"{counts['frozen']:,} are frozen; {len(table):,} rows, features {training.features}, {precision} on {device}",
        flush=True,
    )
    cache = params.runtime.live_cache_mb * 1_000_000
    source, heldout_source = _sources(training.features, encoder, ((table, dataset), (heldout, params.data.heldout)), cache)
    if training.features == "stored":
        encoder.drop_tower()
    schedule = Schedule(**{key: getattr(training, key) for key in Schedule.__dataclass_fields__})
    model.to(accelerator.device)
    before = frozen_digest(model)
    resume = _resume(params, training, schedule, model, encoder, table, precision, name)
    keeper = Keeper(resume, minutes=params.runtime.save_minutes)
    first, runtime = accelerator.is_main_process, params.runtime
    divided = runtime.divided and accelerator.num_processes > 1
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
            watch=watch,
            threads=max(1, runtime.workers),
            divided=divided,
        )
    if frozen_digest(model) != before or any(p.grad is not None for p in model.parameters() if not p.requires_grad):
        raise AssertionError("a frozen parameter has changed or has a gradient")
    if divided:
        model = gather(model, _model(params, training, encoder, precision, start)).to(accelerator.device)
        model.language_model.set_attn_implementation(attention)
    if accelerator.is_main_process:
        _save(params, model, encoder, builder, training.train, start, Path("models") / name)
        _write_history(Path("results") / name / "history.csv", history)
    figures = _measure(params, training, model, heldout, heldout_source, accelerator, builder)
    if accelerator.is_main_process:
        resume.clear()
    accelerator.end_training()
    return figures | {
        "train_loss": round(sum(row["loss"] for row in history[-20:]) / len(history[-20:]), 6),
        "steps": len(history),
    }


def _sharing(
    training: Training, model: VisionLanguageModel, table: TokenTable, name: str, accelerator: Accelerator
) -> Sharing | None:
    """Which rows share their beginning, where params ask for it and the language model can have it."""
    if not training.share_images:
        return None
    config = model.language_model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None or getattr(config, "router_aux_loss_coef", None) is not None:
        kind = "attends to a sliding window" if window is not None else "has a router that counts tokens"
        raise PipelineError(f"{config.model_type} {kind}", where=f"{name}.share_images", remedy=f"set {name}.share_images: false")
    sharing = find_sharing(table)
    shared = f"{len(table):,} rows share {sharing.group.max() + 1:,} beginnings, {sharing.rows_a_group:.1f} each"
    accelerator.print(f"{name}: {shared}", flush=True)
    return sharing


def _resume(
    params: StageParams,
    training: Training,
    schedule: Schedule,
    model: VisionLanguageModel,
    encoder: Encoder,
    table: TokenTable,
    precision: str,
    name: str,
) -> Resume:
    """A run's key: its numbers, its rows, the encoder and every weight it starts from."""
    tokens = xxhash.xxh3_128()
    with table.path.open("rb") as file:
        while block := file.read(1 << 24):
            tokens.update(block)
    depends = {
        "schedule": asdict(schedule),
        "train": training.train,
        "share_images": training.share_images,
        "projector": params.projector.kind,
        "precision": precision,
        "encoder": encoder.spec(),
        "tokens": tokens.hexdigest(),
        "weights": weights_digest(model.parameters()),
    }
    return Resume(main_checkout() / ".dvc" / "tmp" / "resume", name, depends)


def _encoder(params: StageParams, device: torch.device) -> Encoder:
    vision, runtime = params.vision, params.runtime
    return Encoder(
        vision.model,
        revision=vision.revision,
        layer=vision.layer,
        precision=vision.precision,
        storage=vision.storage,
        device=device,
        batch=runtime.extract_batch,
    )


def _builder(params: StageParams, encoder: Encoder, *tables: TokenTable) -> PromptBuilder:
    llm = params.llm
    builder = PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=encoder.tokens)
    for table in tables:
        if table.spec != builder.spec():
            raise PipelineError(
                f"was made for another tokenizer, template or encoder than {llm.model}",
                where=str(table.path),
                remedy="dvc repro tokenize",
                code=ARTEFACT,
            )
    return builder


def _model(params: StageParams, training: Training, encoder: Encoder, precision: str, start: Path | None) -> VisionLanguageModel:
    """Frozen weights are held in bfloat16 where the hardware computes in it; weights that train stay float32."""
    frozen = training.train == "projector" and precision == "bfloat16"
    dtype = torch.bfloat16 if frozen else torch.float32
    kind = params.projector.kind
    if start is None:
        language_model = load_language_model(params.llm.model, revision=params.llm.revision, dtype=dtype)
        projector = build_projector(kind, encoder.width, hidden_size(language_model))
        return VisionLanguageModel(projector, language_model)
    model, manifest = checkpoint.load(start, dtype=dtype)
    if manifest.projector["kind"] != kind or manifest.vision["spec"] != encoder.spec():
        raise PipelineError(
            "was trained for another projector or encoder", where=str(start), remedy="dvc repro pretrain", code=ARTEFACT
        )
    return model


def _sources(features: str, encoder: Encoder, tables: tuple[tuple[TokenTable, Dataset], ...], cache: int) -> list[FeatureSource]:
    if features == "live":
        return [LiveFeatures(encoder, open_dataset(dataset).images, table, cache_bytes=cache) for table, dataset in tables]
    store = FeatureStore(FEATURES)
    store.check_encoder(encoder.spec())
    return [StoredFeatures(store, table, encoder.device) for table, _ in tables]


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
) -> dict[str, Any]:
    """Held-out loss, accuracy, and the accuracy of the blind control."""
    loss = heldout_loss(model, table, source, accelerator, image_id=builder.image_id, micro_tokens=training.micro_tokens)
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
