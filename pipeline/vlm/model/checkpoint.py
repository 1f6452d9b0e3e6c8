"""A trained model on disk: a folder without the vision tower, which `pipeline.chat` and the next stage can open.

projector.safetensors   always
glance.json             encoder (name, revision, layer, fingerprint), language model, projector kind, text settings
config.json, model.safetensors, tokenizer files...   only when the language model has trained, as Transformers writes them
checksums.json          of all of these; every byte is verified before one is used

What the folder leans on without holding it is known by content as well: the encoder by its spec, a frozen language model by
its files' checksums.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.core import (
    ARTEFACT,
    PipelineError,
    brief,
    is_signed,
    map_tensors,
    named_by,
    publish_folder,
    set_mode,
    to_json,
    verify,
    writing,
)
from pipeline.text import PromptBuilder
from pipeline.vlm.model.language_model import language_model_files, load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

FORMAT = 2  # 1 had no checksums: such a folder is from elsewhere, and read as it is
MANIFEST = "glance.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is needed to put a checkpoint together again.

    Attributes:
        vision: model, revision, layer of the encoder, and `spec`, what its features depend on; of several `members`, such a
            section for each.
        llm: model, revision and image_token of the language model the run started from, and where it stays frozen `files`,
            the checksums of its files by name; `date` where its template writes one.
        projector: kind, width (Dv), hidden (D); merge and factor where patches are merged.
        own_llm: whether the folder holds a trained language model.
    """

    vision: dict[str, Any]
    llm: dict[str, Any]
    projector: dict[str, Any]
    own_llm: bool

    @property
    def encoders(self) -> list[dict[str, Any]]:
        """The section of each encoder, in the order in which their channels stand."""
        members: list[dict[str, Any]] = self.vision.get("members", [self.vision])
        return members

    @property
    def merging(self) -> tuple[str, int]:
        """`projector.merge` and `projector.factor`."""
        return str(self.projector.get("merge", "none")), int(self.projector.get("factor", 1))


def save(folder: Path, model: VisionLanguageModel, manifest: Manifest, builder: PromptBuilder) -> None:
    """Write the folder whole or not at all; refuses weights that are not finite."""
    require_finite(model, folder)
    with publish_folder(folder) as temporary, writing(folder):
        write(temporary, model, manifest, builder)


def require_finite(model: VisionLanguageModel, folder: Path) -> None:
    """Raises `PipelineError` naming the first weight that is not finite, of a model that is to be written to `folder`."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise PipelineError(f"{name} is not finite", where=str(folder), remedy="lower lr", code=ARTEFACT)


def write(folder: Path, model: VisionLanguageModel, manifest: Manifest, builder: PromptBuilder) -> None:
    """Write the files of a checkpoint into a folder that is not yet to be seen by others."""
    if manifest.own_llm:
        _write_language_model(model.language_model, folder)
        builder.tokenizer.init_kwargs.pop("local_files_only", None)  # how it was loaded is no part of the model
        builder.tokenizer.save_pretrained(folder)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.projector.state_dict().items()}
    save_file(weights, folder / "projector.safetensors")
    for file in folder.glob("*.safetensors"):
        set_mode(file, 0o644)  # the writer makes them the owner's alone
    (folder / MANIFEST).write_text(to_json({"format": FORMAT, **asdict(manifest)}), encoding="utf-8")


def _write_language_model(language_model: Any, folder: Path) -> None:
    """Transformers writes weights in the first process of all only; but each work tree's first has a folder to write."""
    language_model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        language_model.save_pretrained(folder)
    finally:
        del language_model.should_save_on_this_rank
    if not any(folder.glob("model*.safetensors")):
        raise AssertionError(f"{folder}: Transformers has written no weights in this process")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint; raises `PipelineError` naming the command that makes one."""
    path = Path(folder) / MANIFEST
    if is_signed(path.parent):
        verify(path.parent, remedy=_remedy(path.parent), wanted=lambda name: name == MANIFEST)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] not in (1, FORMAT):
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        if content["format"] == FORMAT and not is_signed(path.parent):
            verify(path.parent, remedy=_remedy(path.parent))
        _require_types(content)
        return Manifest(content["vision"], content["llm"], content["projector"], content["own_llm"])
    except FileNotFoundError:
        raise PipelineError("no model here", where=str(folder), remedy="dvc repro", code=ARTEFACT) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PipelineError(f"not a model: {brief(error)}", where=str(path), remedy="dvc repro -f", code=ARTEFACT) from None


_TYPES: dict[str, dict[str, Any]] = {
    "vision": {"model": str, "revision": str, "layer": int, "spec": dict},
    "llm": {"model": str, "revision": str, "image_token": str},
    "projector": {"kind": str, "width": int, "hidden": int},
}
LARGEST = 1 << 20  # width of an encoder or a language model


def _require_types(content: dict[str, Any]) -> None:
    """Raises ValueError or KeyError for a manifest that no `save` has written."""
    vision = content["vision"]
    if type(vision) is not dict or type(members := vision.get("members", [vision])) is not list or not members:
        raise ValueError(f"vision is {vision!r:.40}, expected a section for each encoder")
    for part, section in [("llm", content["llm"]), ("projector", content["projector"]), *(("vision", each) for each in members)]:
        for key, kind in _TYPES[part].items():
            value: Any = section[key]
            if type(value) is not kind or (kind is int and key != "layer" and not 0 < value <= LARGEST):
                raise ValueError(f"{part}.{key} is {value!r:.40}, expected {kind.__name__}")
    for each in members:
        each["spec"]["precision"]


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[VisionLanguageModel, Manifest]:
    """Projector and language model of a checkpoint, strictly; the encoder is loaded apart (`manifest.vision`).

    Raises `PipelineError` naming the file that is not as it was written, of the folder or of a frozen language model.
    """
    manifest = read_manifest(folder)
    if is_signed(Path(folder)):
        verify(Path(folder), remedy=_remedy(Path(folder)))
    else:
        print(f"{folder}: has no checksums.json, so its files are taken as they are", file=sys.stderr, flush=True)
    shape = manifest.projector
    try:
        projector = build_projector(shape["kind"], int(shape["width"]), int(shape["hidden"]), *manifest.merging)
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(
            f"not a model: {brief(error)}", where=str(Path(folder) / MANIFEST), remedy="dvc repro -f", code=ARTEFACT
        ) from None
    load_projector(projector, folder)
    if manifest.own_llm:
        language_model = load_language_model(str(folder), dtype=dtype, verified=True)
    else:
        _require_same_files(folder, manifest)
        language_model = load_language_model(
            named_by(folder, manifest.llm["model"]), revision=manifest.llm["revision"], dtype=dtype
        )
    return VisionLanguageModel(projector, language_model), manifest


def _require_same_files(folder: str | Path, manifest: Manifest) -> None:
    """Raises `PipelineError` naming a file of the frozen language model that is another than in training."""
    model, trained = named_by(folder, manifest.llm["model"]), manifest.llm.get("files", {})
    found = language_model_files(model, revision=manifest.llm["revision"]) if trained else {}
    for name in sorted(trained.keys() | found.keys()):
        if trained.get(name) != found.get(name):
            what = "has changed" if name in trained and name in found else "is gone" if name in trained else "has come"
            raise PipelineError(
                f"{what} since {folder} was trained with it",
                where=f"{model}/{name}",
                remedy="bring it back, or train again: dvc repro -f pretrain",
                code=ARTEFACT,
            )


def _remedy(folder: Path) -> str:
    """What makes a damaged checkpoint anew."""
    if folder.parent.name == "models" and folder.name in ("pretrain", "sft"):
        return f"dvc repro -f -s {folder.name}"
    return "write it anew with the command that made it, or copy it again"


def load_projector(projector: torch.nn.Module, folder: str | Path) -> None:
    """Projector weights into `projector`; every tensor must be there with its shape."""
    path = Path(folder) / "projector.safetensors"
    try:
        projector.load_state_dict(map_tensors(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise PipelineError(
            f"does not fit the projector in params: {brief(error)}", where=str(path), remedy="dvc repro pretrain", code=ARTEFACT
        ) from None
