"""A checkpoint's parts -> a Transformers Idefics3 model (the layout of SmolVLM): SigLIP, space to depth, one matrix.

Its own processor writes tokens around a picture that training has not, and so cannot be used: DeepSeek-VL's, which writes the
placeholders alone, stands in its place, with Idefics3's image processor. Shapes: Dv vision width, f merging factor, D hidden size.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekVLProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    PreTrainedConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from pipeline.core import ARTEFACT, PipelineError, merged_tokens, write_json
from pipeline.core.devices import DTYPES
from pipeline.export.llava import build_generation_config, check_language_model, is_tied, language_tensors, write_weights
from pipeline.export.processor import exported_tokenizer, parts_template
from pipeline.export.source import Source
from pipeline.vlm.model import BIASLESS, require_idefics3

VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
          "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout")  # fmt: skip
# Idefics3's names of a tensor -> llava-hf's, by which the rest of this room knows it.
NAMES = {
    "model.text_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.connector.modality_projection.proj.": "multi_modal_projector.linear_1.",
    "model.vision_model.": "vision_tower.",
}


def takes(source: Source) -> bool:
    """Whether this class is the one for such a projector: merged patches, or a matrix alone."""
    return source.manifest.merging[0] != "none" or source.kind == BIASLESS


def check_exportable(source: Source) -> None:
    """Raises `PipelineError` where Idefics3 does not compute what this pipeline does."""
    source.check_rows("Idefics3")
    tower, merging = source.encoder.tower.config, source.manifest.merging
    require_idefics3(
        source.kind,
        merging,
        family=tower.model_type,
        layer=source.manifest.vision["layer"],
        grid=tower.image_size // tower.patch_size,
    )
    check_language_model(source, "Idefics3")
    _siglip_settings(source)


def build_config(source: Source, dtype: str) -> Idefics3Config:
    check_exportable(source)
    tower, text = source.encoder.tower.config, deepcopy(source.language_model.config)
    text.architectures = [type(source.language_model).__name__]
    text.tie_word_embeddings, text._name_or_path = is_tied(source.language_model), ""
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**{key: getattr(tower, key) for key in VISION}),
        text_config=text,
        image_token_id=source.builder.image_id,
        scale_factor=source.manifest.merging[1],
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.architectures = [Idefics3ForConditionalGeneration.__name__]
    config.dtype = text.dtype = config.vision_config.dtype = DTYPES[dtype]  # type: ignore[union-attr]
    return config


def _tensors(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    yield "model.connector.modality_projection.proj.weight", source.model.projector.state_dict()["0.weight"]
    for name, tensor in source.encoder.tower.state_dict().items():
        inner = name.removeprefix("vision_model.")
        if not inner.startswith("head."):  # SigLIP's pooling, which patch features do not pass
            yield f"model.vision_model.{inner}", tensor
    theirs = {ours: name for name, ours in NAMES.items()}
    for name, tensor in language_tensors(source.language_model):
        prefix = next(prefix for prefix in theirs if name.startswith(prefix))
        yield f"{theirs[prefix]}{name.removeprefix(prefix)}", tensor


def write_model(source: Source, folder: Path, dtype: str) -> int:
    """config.json, generation_config.json and the weights; returns the parameter count."""
    build_config(source, dtype).save_pretrained(folder)
    build_generation_config(source).save_pretrained(folder)
    return write_weights(dict(_tensors(source)), folder, dtype)


def write_processor(source: Source, folder: Path) -> None:
    """As `pipeline.export.processor.write_processor`, for this class."""
    builder, settings = source.builder, _siglip_settings(source)
    tokenizer: Any = exported_tokenizer(source)
    tokenizer.image_token = tokenizer.init_kwargs["image_token"] = builder.image_token  # here, and in what is saved
    square = {"longest_edge": source.encoder.side}
    try:  # resized once only, to the square
        images = Idefics3ImageProcessorPil(do_resize=False, do_image_splitting=False, max_image_size=square, **settings)
    except ImportError:  # Transformers 5.17 has a placeholder there
        raise PipelineError(
            "this Transformers has Idefics3's image processor only with torchvision",
            where="merged image tokens leave as Idefics3",
            remedy="pip install torchvision, or a newer transformers",
        ) from None
    own = str(builder.tokenizer.chat_template)
    processor = DeepseekVLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=parts_template(own, image_token=builder.image_token, options=builder.options, dates=builder.dates),
        num_image_tokens=merged_tokens(source.encoder.tokens, source.manifest.merging[1]),
    )
    processor.save_pretrained(folder)
    nested = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    write_json(folder / "preprocessor_config.json", {**nested, "processor_class": DeepseekVLProcessor.__name__})


def _siglip_settings(source: Source) -> dict[str, Any]:
    """What Idefics3's image processor takes over; raises `PipelineError` where the encoder's does more than it can."""
    encoder = source.encoder
    images: Any = AutoImageProcessor.from_pretrained(
        encoder.name, revision=encoder.revision or "main", backend="pil", trust_remote_code=False
    )
    square = {"height": encoder.side, "width": encoder.side}
    if (
        not images.do_resize
        or dict(images.size) != square
        or getattr(images, "do_center_crop", None)
        or getattr(images, "do_pad", None)
    ):
        raise PipelineError(
            "Idefics3 takes no encoder whose image processor crops or pads: it resizes to a square",
            where="vision.model",
            remedy="train with a SigLIP encoder and its own image processor",
            code=ARTEFACT,
        )
    keys = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
    return {key: getattr(images, key) for key in keys if getattr(images, key, None) is not None}


def siglip_config(config: PreTrainedConfig) -> SiglipVisionConfig:
    """The vision tower's configuration again, without the head that Idefics3 has no place for."""
    return SiglipVisionConfig(**{key: getattr(config, key) for key in VISION}, vision_use_head=False)


def siglip_processor(images: Any) -> SiglipImageProcessorPil:
    """The encoder's own image processor again."""
    side = images.max_image_size["longest_edge"]
    keys = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
    return SiglipImageProcessorPil(size={"height": side, "width": side}, **{key: getattr(images, key) for key in keys})


def llava_name(name: str) -> str:
    """A tensor's name as llava-hf would have it; one that is none of Idefics3's stays."""
    return next((ours + name.removeprefix(theirs) for theirs, ours in NAMES.items() if name.startswith(theirs)), name)
