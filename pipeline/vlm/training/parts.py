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
    FusedEncoder,
    LiveFeatures,
    member_folders,
    stored_features,
    warn_of_resampling,
)
from pipeline.params import Dataset, StageParams, Training
from pipeline.records import open_dataset
from pipeline.text import DATE, PromptBuilder, TokenTable
from pipeline.vlm.batches import PAYS, Sharing, find_sharing
from pipeline.vlm.model import (
    Manifest,
    VisionLanguageModel,
    build_projector,
    can_pack,
    checkpoint,
    hidden_size,
    load_language_model,
    mixes_conversations,
)


def make_builder(params: StageParams, encoder: Encoder | FusedEncoder, *tables: TokenTable) -> PromptBuilder:
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
    params: StageParams, training: Training, encoder: Encoder | FusedEncoder, precision: str, start: Path | None
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


def check_start(params: StageParams, encoder: Encoder | FusedEncoder, builder: PromptBuilder, start: Path) -> None:
    """A start may come from elsewhere, by an import: what it was trained with must be what params name."""
    manifest, llm = checkpoint.read_manifest(start), params.llm
    kind, differ = manifest.projector["kind"], other_features(manifest, encoder)
    for part in manifest.encoders:
        warn_of_resampling(part["spec"], str(start), "train it again")
    problem = remedy = ""
    if kind != params.projector.kind:
        problem, remedy = f"has a {kind} projector", f"set projector.kind: {kind}"
    elif projector_shape(params) != {key: manifest.projector[key] for key in manifest.projector.keys() - {"width", "hidden"}}:
        merge, factor = manifest.merging
        problem = f"was trained with projector.merge: {merge}, projector.factor: {factor}"
        remedy = f"set projector.merge: {merge}, projector.factor: {factor}"
    elif differ:
        problem = f"was trained on other features than {encoder.name} gives ({', '.join(differ)})"
        trained = {key: _one_or_all(values) for key, values in _trained_with(manifest).items()}
        remedy = f"set {', '.join(f'vision.{key}: {value}' for key, value in trained.items())}"
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


def other_features(manifest: Manifest, encoder: Encoder | FusedEncoder) -> list[str]:
    """Where the features that a checkpoint was trained on differ from those of `encoder`, in what decides their values."""
    trained, found = [part["spec"] for part in manifest.encoders], [member.spec() for member in encoder.members]
    if len(trained) != len(found):
        return ["the number of encoders"]
    pairs = zip(trained, found, strict=True)
    return sorted(
        {key for one, other in pairs for key in {*one, *other} - {"precision", RESAMPLING} if one.get(key) != other.get(key)}
    )


def _trained_with(manifest: Manifest) -> dict[str, list[Any]]:
    """Keys of `vision` that decide the features, with the values of every encoder."""
    parts = manifest.encoders
    stored = {key: [part["spec"].get(key, usual) for part in parts] for key, usual in (("storage", "float16"), ("pool", 1))}
    return {"model": [part["model"] for part in parts], "layer": [part["layer"] for part in parts], **stored}


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len({str(value) for value in values}) == 1 else values


def open_feature_sources(
    features: str, encoder: Encoder | FusedEncoder, tables: tuple[tuple[TokenTable, Dataset], ...], cache: int, store: Path
) -> list[FeatureSource]:
    """Where the pictures' features of each table come from: `features` is stored or live, `cache` bytes for live ones.

    `store`: the folder of the stored ones.
    """
    if features == "live":
        return [LiveFeatures(encoder, open_dataset(dataset).images, table, cache_bytes=cache) for table, dataset in tables]
    stores = [FeatureStore(folder) for folder in member_folders(store, len(encoder.members))]
    for opened, member in zip(stores, encoder.members, strict=True):
        opened.check_encoder(member.spec())
    return [stored_features(stores, table, encoder.device) for table, _ in tables]


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
