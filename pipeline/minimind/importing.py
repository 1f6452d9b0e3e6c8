"""A MiniMind or MiniMind-V `.pth` -> a folder.

Writes config.json, model.safetensors and generation_config.json, as `llm.model` takes them; a tokenizer's files where one is
given; projector.safetensors where the file has a projector; glance.json (and so a checkpoint that chat and sft open) where
asked for, with the encoder that params.yaml names.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from pipeline.core import ARTEFACT, PipelineError, publish_folder, writing
from pipeline.core.devices import pick_device
from pipeline.core.loading import read_pretrained
from pipeline.minimind.configuration import describe
from pipeline.minimind.convert import Tensors, to_transformers
from pipeline.minimind.layout import EMBEDDING, HEAD, Layout, infer
from pipeline.minimind.projector import Projector, read_projector, split
from pipeline.minimind.pth import check_finite, read_pth
from pipeline.text import PromptBuilder
from pipeline.vlm.model import Manifest, VisionLanguageModel, checkpoint, load_language_model

IMAGE_TOKENS = {2025: "@", 2026: "<|image_pad|>"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says about a `.pth` because it cannot; None stands for MiniMind's default."""

    heads: int | None = None
    experts_per_token: int | None = None
    eps: float | None = None
    rope_theta: float | None = None
    positions: int | None = None
    image_token: str | None = None


def import_file(path: Path, out: Path, *, given: Given, tokenizer: Path | None = None, as_checkpoint: bool = False) -> list[str]:
    """Write the folder, whole or not at all; returns the lines that say what was made and what is still needed.

    Raises `PipelineError` for a file that `read_pth` or `infer` refuses, for a tokenizer that does not fit, and when `out`
    is there already.
    """
    where = str(path)
    language, projection, tower = split(read_pth(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in language.items()}
    tied = HEAD not in language or EMBEDDING not in language or torch.equal(language[HEAD], language[EMBEDDING])
    layout = infer(shapes, where=where, heads=given.heads, tied=tied)
    if given.experts_per_token and not given.experts_per_token <= layout.experts:
        raise PipelineError(f"--experts-per-token {given.experts_per_token}: the file has {layout.experts} experts", where=where)
    projector = read_projector(projection, layout.hidden, where=where) if projection else None
    config = describe(
        layout,
        eps=given.eps,
        rope_theta=given.rope_theta,
        positions=given.positions,
        experts_per_token=given.experts_per_token,
    )
    config.dtype = language[EMBEDDING].dtype
    image_token = given.image_token or IMAGE_TOKENS[layout.year]
    loaded = _load_tokenizer(tokenizer, config, image_token) if tokenizer else None
    refuse_existing(out)
    state = to_transformers(language, layout)
    for name, tensor in state.items():
        check_finite(name, tensor, where=where)
    made = _prepare_checkpoint(projector, tokenizer, image_token, out) if as_checkpoint else None
    with publish_folder(out) as temporary:
        with writing(out):
            _write_language_model(temporary, state, config, loaded)
            if tokenizer:
                _copy_tokenizer(tokenizer, temporary)
        if made:
            module, manifest, builder = made
            model = VisionLanguageModel(module, load_language_model(str(temporary), dtype=config.dtype))
            checkpoint.require_finite(model, out)
            for written in temporary.iterdir():
                written.unlink()
            checkpoint.write(temporary, model, manifest, builder)
        elif projector:
            with writing(out):
                _write_projector(temporary, projector)
    return _report_import(out, layout, config, state, projector, tower, image_token, as_checkpoint, loaded is not None)


def _load_tokenizer(folder: Path, config: PreTrainedConfig, image_token: str) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, with a chat template, the image token and no more tokens than the embedding table has rows."""
    where, plain = str(folder), cast(Any, config)
    if not (folder / "tokenizer.json").is_file():
        raise PipelineError("holds no tokenizer.json", where=where, remedy="give the folder of a tokenizer with --tokenizer")
    tokenizer: Any = read_pretrained(AutoTokenizer, str(folder), where="--tokenizer", local_files_only=True)
    if not tokenizer.is_fast or not tokenizer.chat_template:
        lacks = "a chat template" if tokenizer.is_fast else "a fast tokenizer"
        raise PipelineError(f"has not {lacks}", where=where, remedy="give the tokenizer of a chat model", code=ARTEFACT)
    if len(tokenizer) > plain.vocab_size:
        raise PipelineError(
            f"its {len(tokenizer):,} tokens are more than the {plain.vocab_size:,} of the weights",
            where=where,
            remedy="give the tokenizer that the weights were trained with",
        )
    if image_token not in tokenizer.get_vocab():
        raise PipelineError(f"{image_token!r} is not a token of it", where=where, remedy="set --image-token to one that it has")
    return cast(PreTrainedTokenizerFast, tokenizer)


def refuse_existing(path: Path) -> None:
    """Raises `PipelineError` where writing `path` would replace something, or cannot work."""
    with writing(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise PipelineError("is there already", where=str(path), remedy="choose another place, or delete it first")
        path.parent.mkdir(parents=True, exist_ok=True)


def _prepare_checkpoint(
    projector: Projector | None, tokenizer: Path | None, image_token: str, out: Path
) -> tuple[nn.Sequential, Manifest, PromptBuilder]:
    """The parts of a checkpoint beside its language model, with the encoder of params.yaml; raises before writing anything."""
    if projector is None or tokenizer is None:
        lacks = "a projector, which this file has not" if projector is None else "a tokenizer"
        remedy = "leave --checkpoint out" if projector is None else "add --tokenizer"
        raise PipelineError(f"--checkpoint needs {lacks}", remedy=remedy)
    from pipeline.features import describe_encoders, load_encoder
    from pipeline.params import load

    params = load()
    vision = params.vision
    encoder = load_encoder(vision, device=pick_device(params.runtime.device), batch=1)
    if encoder.width != projector.width:
        raise PipelineError(
            f"the projector takes features of width {projector.width}, {encoder.name} gives {encoder.width}",
            where="params.yaml",
            remedy="set vision.model to the encoder it was trained on",
        )
    manifest = Manifest(
        vision=describe_encoders(vision, encoder),
        llm={"model": str(out), "revision": "", "image_token": image_token},
        projector={"kind": projector.kind, "width": projector.width, "hidden": projector.hidden},
        own_llm=True,
    )
    return projector.module(), manifest, PromptBuilder(str(tokenizer), image_token=image_token, tokens=encoder.tokens)


def _write_language_model(
    folder: Path, state: Tensors, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """Control tokens are the tokenizer's, or MiniMind's 1, 2 and 0."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if tokenizer:
        ids = {key: getattr(tokenizer, key) for key in ids}
    for key, value in ids.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_projector(folder: Path, projector: Projector) -> None:
    weights = {name: tensor.float() for name, tensor in projector.tensors.items()}
    metadata = {"format": "pt", "kind": projector.kind, "width": str(projector.width), "hidden": str(projector.hidden)}
    save_file(weights, folder / "projector.safetensors", metadata=metadata)


def _report_import(
    out: Path,
    layout: Layout,
    config: PreTrainedConfig,
    state: Tensors,
    projector: Projector | None,
    tower: Tensors,
    image_token: str,
    as_checkpoint: bool,
    has_tokenizer: bool,
) -> list[str]:
    plain: Any = config
    size = sum(tensor.numel() for tensor in state.values())
    experts = (f", {layout.experts} experts" if layout.experts else "") + (f" + {layout.shared} shared" if layout.shared else "")
    lines = [
        f"{out}: MiniMind's layout of {layout.year} as {plain.architectures[0]}, {size:,} parameters, {str(plain.dtype)[6:]}; "
        f"{layout.layers} layers of width {layout.hidden}, {layout.heads} heads, {layout.kv_heads} key/value heads{experts}"
        + ("" if layout.tied else "; its vocabulary projection differs from its embedding table")
    ]
    if projector:
        lines.append(f"projector: {projector.kind}, for patch features of width {projector.width}")
    if tower:
        count = sum(tensor.numel() for tensor in tower.values())
        lines.append(f"left out: the vision tower, {len(tower)} tensors vision_encoder.* ({count:,} parameters)")
    wanted = [f"llm.model: {out}", f"llm.image_token: '{image_token}'"] + (
        [f"projector.kind: {projector.kind}"] if projector else []
    )
    wanted += [f"sft.start: {out}"] if as_checkpoint else []
    lines.append(f"for params.yaml: {', '.join(wanted)}")
    if not has_tokenizer:
        lines.append(f"still needed: a tokenizer with a chat template in {out} -> --tokenizer FOLDER")
    elif as_checkpoint:
        lines.append(f"talk to it: python -m pipeline.chat PICTURE --model {out}")
    return lines
