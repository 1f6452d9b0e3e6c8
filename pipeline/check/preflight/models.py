"""Model folders of all stages, whole and of families that fit; nothing of a model is loaded."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.check.costs import encoder_shape
from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import EncoderParts, Project
from pipeline.core import PipelineError, merged_tokens
from pipeline.features import side_of, tower_class
from pipeline.vlm.model import checkpoint

WHOLE = "copy or download it again"


def check_encoder(project: Project) -> Iterator[Finding]:
    """The vision encoders: folder, family, number format, layer and preprocessor of each, and what they come to."""
    for parts in project.encoders:
        if not project.is_made_later(parts.named.model):
            found = list(_encoder(parts))
            yield from found
            if found or parts.tower_config is None:
                return
    if any(project.is_made_later(parts.named.model) for parts in project.encoders):
        return
    try:
        merged_tokens(encoder_shape(project.params).tokens, project.params.projector.factor)
    except PipelineError as error:
        yield Finding.of(error)


def _encoder(parts: EncoderParts) -> Iterator[Finding]:
    vision, config, where = parts.named, parts.config, "vision.model"
    yield from _folder(vision.model, where)
    if isinstance(config, PipelineError):
        yield Finding.of(config)
        return
    yield from _quantised(config, vision.model, where)
    tower = parts.tower_config
    if tower is None:
        try:
            tower_class(vision.model, config.model_type)
        except PipelineError as error:
            yield Finding.of(error)
        return
    if not -tower.num_hidden_layers - 1 <= vision.layer <= tower.num_hidden_layers:
        yield Finding(f"is {vision.layer}; {vision.model} has {tower.num_hidden_layers} layers", "vision.layer", "set vision.layer")
    try:
        if isinstance(parts.preprocessor, PipelineError):
            raise parts.preprocessor
        side_of(tower, parts.preprocessor.size(), vision.model)
    except PipelineError as error:
        yield Finding.of(error)


def check_language_model(project: Project) -> Iterator[Finding]:
    """The language model: its folder, whether it is a causal one that takes embeddings, its number format."""
    llm, config, where = project.params.llm, project.language_config, "llm.model"
    if project.is_made_later(llm.model):
        return
    yield from _folder(llm.model, where)
    if isinstance(config, PipelineError):
        yield Finding.of(config)
        return
    yield from _quantised(config, llm.model, where)
    if reason := no_language_model(config):
        yield Finding(f"{llm.model} is a {config.model_type}: {reason}", where, "choose a causal language model")
    elif isinstance(project.skeleton, PipelineError):
        yield Finding.of(project.skeleton)


def no_language_model(config: Any) -> str:
    """Why a configuration is not that of a causal language model that takes embeddings; empty where it is."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder and a decoder"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "Transformers has no causal language model of it"
    if any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        return "it sees or hears already; its text model alone would do"
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "inputs_embeds" not in inspect.signature(family.forward).parameters:
        return "it takes token ids only, and pictures are none"
    return ""


def check_start(project: Project) -> Iterator[Finding]:
    """What sft goes on from, where no stage makes it."""
    start = project.params.sft.start
    if not project.made or start in map(str, project.made) or project.is_made_later(start):
        return
    try:
        manifest = checkpoint.read_manifest(start)
    except PipelineError as error:
        yield Finding(error.what, "sft.start", "set sft.start: models/pretrain, or import a model there")
        return
    if manifest.own_llm:
        yield from _folder(start, "sft.start")
    if manifest.projector["kind"] != project.params.projector.kind:
        kind = manifest.projector["kind"]
        yield Finding(f"{start} has a {kind} projector", "sft.start", f"set projector.kind: {kind}")


def _quantised(config: Any, model: str, where: str) -> Iterator[Finding]:
    found = next((part.quantization_config for part in _parts(config) if getattr(part, "quantization_config", None)), None)
    if found is not None:
        settings = found if isinstance(found, dict) else found.to_dict()
        kind = settings.get("quant_method") or "unknown"
        bits = next((f", {n} bits" for n, key in ((4, "load_in_4bit"), (8, "load_in_8bit")) if settings.get(key)), "")
        yield Finding(
            f"{model} is quantised ({kind}{bits}), which can neither be trained nor exported", where,
            "name the model it was made from, or save it dequantised (model.dequantize().save_pretrained(FOLDER))",
        )  # fmt: skip


def _parts(config: Any) -> list[Any]:
    return [config, *(getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name))]


def _folder(model: str, where: str) -> Iterator[Finding]:
    """Configuration and whole weights in a folder; a hub id is left to the hub."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2 or Path(folder.parts[0]).is_dir():
            yield Finding(f"there is no folder {model}", where, "give a Transformers folder, or a hub id")
        return
    if not (folder / "config.json").is_file():
        yield Finding(f"{model} has no config.json", where, WHOLE)
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError):
            yield Finding(f"{index} cannot be read", where, WHOLE)
            return
    if not names:
        yield Finding(f"{model} has no weights (*.safetensors)", where, WHOLE)
    for name in names:
        if not (folder / name).is_file():
            yield Finding(f"{folder / name} is missing", where, WHOLE)
        elif name.endswith(".safetensors") and not _is_whole(folder / name):
            yield Finding(f"{folder / name} is cut short or no safetensors file", where, WHOLE)


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says; a pointer of Git LFS has no such header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(100_000_000, path.stat().st_size):
                return False
            header = json.loads(file.read(length))
        end = max((int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0)
        return 8 + length + end == path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
