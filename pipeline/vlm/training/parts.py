"""The parts of a training stage, as params name them: prompt builder, model, feature sources, and which rows share an image."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.core import ARTEFACT, PipelineError, merged_tokens
from pipeline.features import (
    RESAMPLING,
    Encoder,
    FeatureSource,
    FeatureStore,
    LiveFeatures,
    StoredFeatures,
    warn_of_resampling,
)
from pipeline.params import Dataset, StageParams, Training
from pipeline.records import open_dataset
from pipeline.text import DATE, PromptBuilder, TokenTable
from pipeline.vlm.batches import PAYS, Sharing, find_sharing
from pipeline.vlm.model import (
    VisionLanguageModel,
    build_projector,
    can_pack,
    checkpoint,
    hidden_size,
    load_language_model,
    mixes_conversations,
)


def make_builder(params: StageParams, encoder: Encoder, *tables: TokenTable) -> PromptBuilder:
    """The builder of `llm`; raises `PipelineError` for a table that another one made."""
    llm, tokens = params.llm, merged_tokens(encoder.tokens, params.projector.factor)
    builder = PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=tokens, date=llm.date)
    for table in tables:
        if table.spec != builder.spec():
            raise PipelineError(
                f"was made for another tokenizer, template, encoder or projector.factor than {llm.model}",
                where=str(table.path),
                remedy="dvc repro tokenize",
                code=ARTEFACT,
            )
    return builder


def make_model(
    params: StageParams, training: Training, encoder: Encoder, precision: str, start: Path | None
) -> VisionLanguageModel:
    """Frozen weights are held in bfloat16 where the hardware computes in it; weights that train stay float32."""
    frozen = training.train == "projector" and precision == "bfloat16"
    dtype = torch.bfloat16 if frozen else torch.float32
    shape = params.projector
    if start is None:
        language_model = load_language_model(params.llm.model, revision=params.llm.revision, dtype=dtype)
        projector = build_projector(shape.kind, encoder.width, hidden_size(language_model), shape.merge, shape.factor)
        return VisionLanguageModel(projector, language_model)
    return checkpoint.load(start, dtype=dtype)[0]


def projector_shape(params: StageParams) -> dict[str, Any]:
    """What a checkpoint says of its projector beside its widths; merging only where there is any."""
    shape = params.projector
    return {"kind": shape.kind} | ({} if shape.factor == 1 else {"merge": shape.merge, "factor": shape.factor})


def check_start(params: StageParams, encoder: Encoder, builder: PromptBuilder, start: Path) -> None:
    """A start may come from elsewhere, by an import: what it was trained with must be what params name."""
    manifest, llm = checkpoint.read_manifest(start), params.llm
    vision, kind, trained, found = manifest.vision, manifest.projector["kind"], manifest.vision["spec"], encoder.spec()
    differ = sorted(key for key in {*trained, *found} - {"precision", RESAMPLING} if found.get(key) != trained.get(key))
    warn_of_resampling(trained, str(start), "train it again")
    problem = remedy = ""
    if kind != params.projector.kind:
        problem, remedy = f"has a {kind} projector", f"set projector.kind: {kind}"
    elif projector_shape(params) != {key: manifest.projector[key] for key in manifest.projector.keys() - {"width", "hidden"}}:
        merge, factor = manifest.merging
        problem = f"was trained with projector.merge: {merge}, projector.factor: {factor}"
        remedy = f"set projector.merge: {merge}, projector.factor: {factor}"
    elif differ:
        problem = f"was trained on other features than {params.vision.model} gives ({', '.join(differ)})"
        stored = f"vision.storage: {trained.get('storage', 'float16')}, vision.pool: {trained.get('pool', 1)}"
        remedy = f"set vision.model: {vision['model']}, vision.layer: {vision['layer']}, {stored}"
    elif not manifest.own_llm and (manifest.llm["model"], manifest.llm["revision"]) != (llm.model, llm.revision):
        problem, remedy = f"was trained for {manifest.llm['model']}", f"set llm.model: {manifest.llm['model']}"
    elif builder.dated and manifest.llm.get("date", DATE) != llm.date:
        problem = f"was trained with llm.date: {manifest.llm.get('date', DATE)}"
        remedy = f"set llm.date: '{manifest.llm.get('date', DATE)}'"
    elif manifest.own_llm:
        own = PromptBuilder(str(start), image_token=llm.image_token, tokens=builder.tokens, date=llm.date)
        if own.tokenizer.get_vocab() != builder.tokenizer.get_vocab():
            problem, remedy = f"its vocabulary is not that of {llm.model}", f"set llm.model: {start}"
    if problem:
        remedy = "dvc repro pretrain" if start == Path("models/pretrain") else remedy
        raise PipelineError(problem, where=str(start), remedy=remedy, code=ARTEFACT)


def open_feature_sources(
    features: str, encoder: Encoder, tables: tuple[tuple[TokenTable, Dataset], ...], cache: int, store: Path
) -> list[FeatureSource]:
    """Where the pictures' features of each table come from: `features` is stored or live, `cache` bytes for live ones.

    `store`: the folder of the stored ones.
    """
    if features == "live":
        return [LiveFeatures(encoder, open_dataset(dataset).images, table, cache_bytes=cache) for table, dataset in tables]
    opened = FeatureStore(store)
    opened.check_encoder(encoder.spec())
    return [StoredFeatures(opened, table, encoder.device) for table, _ in tables]


def choose_sharing(
    training: Training, model: VisionLanguageModel, table: TokenTable, name: str, accelerator: Accelerator
) -> Sharing | None:
    """Which rows share their beginning, where params ask for it and the language model can have it.

    `auto`: where it saves enough, and where masks cost little (not on a GPU for a family that is not packed there). A language
    model whose layers would mix such rows is found out by trying (`pipeline.vlm.model.probing`).
    """
    if not training.share_images:
        return None
    auto, config, device = training.share_images == "auto", model.language_model.config, accelerator.device
    if auto and device.type != "cpu" and not can_pack(config, device):
        return None
    sharing = find_sharing(table)
    if auto and sharing.saved < PAYS:
        return None
    if reason := mixes_conversations(model.language_model):
        if auto:
            accelerator.print(f"{name}: rows about one picture stay apart, since {config.model_type} {reason}", flush=True)
            return None
        raise PipelineError(f"{config.model_type} {reason}", where=f"{name}.share_images", remedy=f"set {name}.share_images: false")
    shared = f"{len(table):,} rows share {sharing.group.max() + 1:,} beginnings, {sharing.rows_a_group:.1f} each"
    accelerator.print(f"{name}: {shared}; {sharing.saved:.0%} of the tokens need no computing", flush=True)
    return sharing
