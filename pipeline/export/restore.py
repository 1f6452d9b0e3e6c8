"""The way back: an export -> a checkpoint folder of this pipeline, to train on (`sft` starts from one) or to chat with.

Reads a folder that `pipeline.export` has written, trained further elsewhere or not. Nothing is assumed to be unchanged:
weights load strictly, and the manifest's encoder is compared again by whoever opens the checkpoint.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Idefics3Config,
    LlavaConfig,
    PreTrainedConfig,
    VipLlavaConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pipeline.core import ARTEFACT, PipelineError, brief, publish_folder, write_json, writing
from pipeline.core.loading import read_pretrained
from pipeline.export.idefics3 import llava_name, siglip_config, siglip_processor
from pipeline.export.marker import check_target, read_marker
from pipeline.export.processor import own_template
from pipeline.features import TOWERS, Encoder
from pipeline.text import DATE, PromptBuilder
from pipeline.vlm.model import (
    LAYERS,
    Manifest,
    VisionLanguageModel,
    backbone_name,
    build_projector,
    checkpoint,
    hidden_size,
    load_language_model,
    logit_factor,
    output_head,
)

IMAGE_KEYS = ("image_token", "model_specific_special_tokens")  # what the processor of an Idefics3 export asks the tokenizer for
PARTS = {"language_model": "language_model.", "projector": "multi_modal_projector.", "tower": "vision_tower."}


def restore_model(folder: Path, out: Path, *, encoder: Path | None = None) -> str:
    """Write `out` in the layout of models/sft; returns what to tell.

    Args:
        encoder: also write the vision encoder to this folder, and name it in the checkpoint instead of the original one.
    """
    manifest = read_marker(folder)
    if out.exists() and not (out / checkpoint.MANIFEST).is_file():
        check_target(out)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    shape = manifest.projector
    projector = build_projector(shape["kind"], shape["width"], shape["hidden"], *manifest.merging)
    _load_projector(projector, tensors["projector"], str(manifest.projector["kind"]), folder)
    with tempfile.TemporaryDirectory() as temporary:
        model, builder = _language_model(folder, Path(temporary), config, tensors["language_model"], manifest, projector)
        if encoder is not None:
            manifest.vision.update(_write_encoder(folder, encoder, config, tensors["tower"], manifest.vision))
        checkpoint.save(out, model, Manifest(manifest.vision, manifest.llm, manifest.projector, own_llm=True), builder)
    vision = manifest.vision
    return (
        f"{out}: {manifest.projector['kind']} projector and language model of {folder}; "
        f"encoder {vision['model']}, vision.layer {vision['layer']}; to train on: sft.start: {out}"
    )


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise PipelineError("holds GGUF files, not a Transformers model", where=str(folder), remedy="export without --gguf")
    for kind in (LlavaConfig, VipLlavaConfig, Idefics3Config):
        try:
            content, _ = PreTrainedConfig.get_config_dict(folder)
            if content.get("model_type") == kind.model_type:
                return kind.from_dict(content)
        except (OSError, ValueError, TypeError) as error:
            raise PipelineError(f"not an export: {brief(error)}", where=str(folder), remedy="export again", code=ARTEFACT) from None
    raise PipelineError("config.json is of no LLaVA or Idefics3 model", where=str(folder), remedy="export again", code=ARTEFACT)


def _read_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors in float32, by part; raises `PipelineError` for one that belongs to no part."""
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    for stored, tensor in _stored_tensors(folder):
        name = llava_name(stored)
        part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)
        if part is None:
            raise PipelineError(f"tensor {stored} belongs to no part of the model", where=str(folder), code=ARTEFACT)
        parts[part][name.removeprefix(PARTS[part])] = tensor.float() if tensor.is_floating_point() else tensor
    return parts


def _stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise PipelineError(
            "no weights here (*.safetensors)", where=str(folder), remedy="export again, without --gguf", code=ARTEFACT
        )
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no dict)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise PipelineError(f"unreadable: {brief(error)}", where=str(path), remedy="export again", code=ARTEFACT) from None


def _load_projector(projector: nn.Sequential, tensors: dict[str, torch.Tensor], kind: str, folder: Path) -> None:
    """LLaVA's names back to ours; two linear layers without an activation between them are one again."""
    try:
        if kind == "linear":
            second, bias = tensors.pop("linear_2.weight"), tensors.pop("linear_2.bias")
            tensors = {
                "linear_1.weight": second @ tensors["linear_1.weight"],
                "linear_1.bias": second @ tensors["linear_1.bias"] + bias,
            }
        places_of = LAYERS.get(kind, {"0": "linear_1"})
        places = {ours: f"{places_of[place]}.{part}" for ours in projector.state_dict() for place, _, part in [ours.partition(".")]}
        state = {ours: tensors.pop(theirs) for ours, theirs in places.items()}
        if tensors:
            raise KeyError(min(tensors))
        projector.load_state_dict(state, strict=True)
    except (KeyError, RuntimeError) as error:
        raise PipelineError(
            f"its tensors are not those of a {kind} projector: {brief(error)}",
            where=str(folder),
            remedy="export again",
            code=ARTEFACT,
        ) from None


def _language_model(
    folder: Path, work: Path, config: Any, tensors: dict[str, torch.Tensor], manifest: Manifest, projector: nn.Sequential
) -> tuple[VisionLanguageModel, PromptBuilder]:
    """A folder with the language model alone, as Transformers writes one, opened the way every stage opens one."""
    save_torch_state_dict(_own_names(tensors, config.text_config), work, metadata={"format": "pt"})
    config.text_config.save_pretrained(work)
    GenerationConfig(eos_token_id=config.text_config.eos_token_id, pad_token_id=config.text_config.pad_token_id).save_pretrained(
        work
    )
    tokenizer: Any = read_pretrained(AutoTokenizer, str(folder), where="its tokenizer")
    tokenizer.chat_template = own_template(str(tokenizer.chat_template))
    tokenizer.padding_side = "right"
    tokenizer._processor_class = None  # a tokenizer of its own again
    for name in ("padding_side", "processor_class"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(work)
    if isinstance(config, Idefics3Config):
        settings = json.loads((work / "tokenizer_config.json").read_text(encoding="utf-8"))
        write_json(work / "tokenizer_config.json", {key: value for key, value in settings.items() if key not in IMAGE_KEYS})
    language_model = load_language_model(str(work))
    language_model.config._name_or_path = ""
    if (factor := logit_factor(language_model)) not in (None, 1):  # the export has it in the projection to the vocabulary
        with torch.no_grad():
            output_head(language_model).weight /= factor
    if hidden_size(language_model) != manifest.projector["hidden"]:
        raise PipelineError(
            "language model and projector do not fit together", where=str(folder), remedy="export again", code=ARTEFACT
        )
    tokens = _tokens(config)
    builder = PromptBuilder(str(work), image_token=manifest.llm["image_token"], tokens=tokens, date=manifest.llm.get("date", DATE))
    return VisionLanguageModel(projector, language_model), builder


def _tokens(config: Any) -> int:
    """Placeholders of a picture."""
    if isinstance(config, Idefics3Config):
        vision: Any = config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2)
    return int(config.image_seq_length)


def _own_names(tensors: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """llava-hf's names of a language model's tensors -> those of its own class."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    head = next(name for name, module in skeleton.named_modules() if module is output_head(skeleton))
    names = {"model.": f"{backbone_name(skeleton)}.", "lm_head.": f"{head}."}
    return {
        next((own + name.removeprefix(theirs) for theirs, own in names.items() if name.startswith(theirs)), name): tensor
        for name, tensor in tensors.items()
    }


def _write_encoder(
    folder: Path, out: Path, config: Any, tensors: dict[str, torch.Tensor], vision: dict[str, Any]
) -> dict[str, Any]:
    """The vision tower and its image processor as a folder that `vision.model` can name; returns what the manifest says of it."""
    check_target(out)
    merged = isinstance(config, Idefics3Config)
    vision_config = siglip_config(config.vision_config) if merged else config.vision_config
    family = TOWERS[vision_config.model_type]
    tower: Any = family(vision_config)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    try:
        tower.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise PipelineError(
            f"not a vision tower: {brief(error)}", where=str(folder), remedy="export again", code=ARTEFACT
        ) from None
    processor = read_pretrained(AutoImageProcessor, str(folder), where="its image processor", backend="pil")
    with publish_folder(out) as temporary, writing(out):
        tower.save_pretrained(temporary)
        (siglip_processor(processor) if merged else processor).save_pretrained(temporary)
    layer = vision["layer"]
    if layer != -1:  # counted in a tower that may have lost the layers behind it
        layer = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer
    before = vision["spec"]
    storage = before.get("storage", "float16")
    found = Encoder(str(out), layer=layer, precision="float32", storage=storage, device=torch.device("cpu"), batch=1).spec()
    return {"model": str(out), "revision": "", "layer": layer, "spec": {**found, "precision": before["precision"]}}
