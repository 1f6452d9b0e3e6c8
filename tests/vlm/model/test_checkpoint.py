"""Checkpoints: what is saved computes the same when loaded; what is damaged, missing or of another kind is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DIALECTS, HIDDEN, PATCHES, WIDTH, World

from pipeline.core.checksums import sign
from pipeline.core.errors import PipelineError
from pipeline.features.sources import StoredFeatures
from pipeline.records.record import ImageSlot, Turn
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.projector import PROJECTORS, build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel


def manifest_of(world: World, *, own_llm: bool, kind: str = "mlp") -> Manifest:
    return Manifest(
        vision={"model": world.clip.name, "revision": "", "layer": -1, "precision": "float32", "spec": world.clip.spec()},
        llm={"model": str(world.llm), "revision": "", "image_token": "<image>"},
        projector={"kind": kind, "width": WIDTH, "hidden": HIDDEN},
        own_llm=own_llm,
    )


def shaken(model: VisionLanguageModel) -> VisionLanguageModel:
    """Weights that no other source than the checkpoint can give."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.01
    return model


def logits(world: World, model: VisionLanguageModel) -> torch.Tensor:
    batch = collate(world.table, np.arange(len(world.table)), image_id=world.builder.image_id, tokens=PATCHES)
    features = StoredFeatures(world.store, world.table).load(batch.slots)
    embeddings = model.embed(batch.ids, features, batch.slot_row, batch.slot_start)
    return model.language_model(inputs_embeds=embeddings).logits.detach()


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("own_llm", [False, True])
def test_a_loaded_model_gives_the_same_logits(world: World, tmp_path: Path, kind: str, own_llm: bool) -> None:
    model = world.model("all", kind=kind)
    shaken(model) if own_llm else shaken(model.projector)  # type: ignore[arg-type]
    manifest = manifest_of(world, own_llm=own_llm, kind=kind)
    checkpoint.save(tmp_path / "m", model, manifest, world.builder)
    again, read = checkpoint.load(tmp_path / "m")
    assert read == manifest == checkpoint.read_manifest(tmp_path / "m")
    assert torch.equal(logits(world, again), logits(world, model))
    assert (tmp_path / "m" / "model.safetensors").exists() == own_llm


@pytest.mark.parametrize("saves", [True, False])
def test_a_process_that_is_not_the_first_of_all_writes_the_same_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    """A second work tree's first process is such a one, and Transformers has it write nothing."""
    model = world.model("all")
    monkeypatch.setattr(type(model.language_model), "should_save_on_this_rank", lambda *_: saves, raising=False)
    checkpoint.save(tmp_path / "m", model, manifest_of(world, own_llm=True), world.builder)
    assert {"model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "m").iterdir()}
    assert "should_save_on_this_rank" not in vars(model.language_model)
    checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize("own_llm", [False, True])
def test_equal_models_are_equal_bytes(world: World, tmp_path: Path, own_llm: bool) -> None:
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, world.model(), manifest_of(world, own_llm=own_llm), world.builder)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_saved_tokenizer_builds_the_same_prompts(
    world: World, tmp_path: Path, builders: dict[str, PromptBuilder], dialect: str
) -> None:
    builder = builders[dialect]
    checkpoint.save(tmp_path / "m", world.model(), manifest_of(world, own_llm=True), builder)
    again = PromptBuilder(str(tmp_path / "m"), image_token=builder.image_token, tokens=builder.tokens)
    turns = [Turn("user", (ImageSlot(0), " What <think>?<|im_end|>")), Turn("assistant", ("It is a <tool> circle.",))]
    assert again.build(turns).ids.tolist() == builder.build(turns).ids.tolist()
    assert (again.end_id, again.image_id, again.control) == (builder.end_id, builder.image_id, builder.control)


def test_a_new_model_replaces_the_whole_folder(world: World, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", world.model(), manifest_of(world, own_llm=True), world.builder)
    checkpoint.save(tmp_path / "m", world.model(), manifest_of(world, own_llm=False), world.builder)
    assert {file.name for file in (tmp_path / "m").iterdir()} == {"projector.safetensors", "glance.json", "checksums.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["projector", "language_model"])
def test_weights_that_are_not_finite_are_refused_and_the_old_model_stays(
    world: World, tmp_path: Path, value: float, part: str
) -> None:
    checkpoint.save(tmp_path / "m", world.model(), manifest_of(world, own_llm=True), world.builder)
    before = (tmp_path / "m" / "projector.safetensors").read_bytes()
    model = world.model("all")
    with torch.no_grad():
        next(getattr(model, part).parameters())[0, 0] = value
    with pytest.raises(PipelineError, match=rf"{part}\..* is not finite"):
        checkpoint.save(tmp_path / "m", model, manifest_of(world, own_llm=True), world.builder)
    assert (tmp_path / "m" / "projector.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def good(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "m"
    checkpoint.save(folder, world.model(), manifest_of(world, own_llm=True), world.builder)
    return folder


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "glance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop(folder: Path, key: str) -> None:
    content = json.loads((folder / "glance.json").read_text())
    del content[key]
    (folder / "glance.json").write_text(json.dumps(content))


def _cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "the folder is missing": shutil.rmtree,
    "the manifest is missing": lambda folder: (folder / "glance.json").unlink(),
    "the manifest is empty": lambda folder: (folder / "glance.json").write_text(""),
    "the manifest is half": lambda folder: _cut(folder / "glance.json", 0.5),
    "the manifest is not UTF-8": lambda folder: (folder / "glance.json").write_bytes(b"\xff\xfe{}"),
    "the manifest is a list": lambda folder: (folder / "glance.json").write_text("[]"),
    "the manifest is of another version": lambda folder: _edit(folder, format=99),
    "the manifest lacks the projector": lambda folder: _drop(folder, "projector"),
    "the manifest lacks the kind": lambda folder: _edit(folder, projector={"width": WIDTH, "hidden": HIDDEN}),
    "the manifest's width is text": lambda folder: _edit(folder, projector={"kind": "mlp", "width": "x", "hidden": HIDDEN}),
    "the manifest names an unknown kind": lambda folder: _edit(
        folder, projector={"kind": "magic", "width": WIDTH, "hidden": HIDDEN}
    ),
    "the projector is missing": lambda folder: (folder / "projector.safetensors").unlink(),
    "the projector is empty": lambda folder: (folder / "projector.safetensors").write_bytes(b""),
    "the projector is half": lambda folder: _cut(folder / "projector.safetensors", 0.5),
    "the projector is text": lambda folder: (folder / "projector.safetensors").write_bytes(b"<html>" * 50),
    "the projector is of another width": lambda folder: _edit(folder, projector={"kind": "mlp", "width": 9, "hidden": HIDDEN}),
    "the language model is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "the language model is half": lambda folder: _cut(folder / "model.safetensors", 0.5),
    "the language model is empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "the configuration is missing": lambda folder: (folder / "config.json").unlink(),
    "the configuration is half": lambda folder: _cut(folder / "config.json", 0.5),
}


@pytest.mark.parametrize("checksums", ["as they were", "of what is there"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_line_that_names_it(tmp_path: Path, good: Path, damage: str, checksums: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(good, folder)
    DAMAGE[damage](folder)
    if checksums == "of what is there" and folder.exists():
        (folder / "checksums.json").unlink()
        sign(folder)
    with pytest.raises(PipelineError) as caught:
        checkpoint.load(folder)
    assert str(folder) in caught.value.line()
    assert len(caught.value.line().splitlines()) == 1


@pytest.mark.parametrize("saved", PROJECTORS)
@pytest.mark.parametrize("wanted", PROJECTORS)
def test_a_projector_of_another_kind_is_refused(world: World, tmp_path: Path, saved: str, wanted: str) -> None:
    checkpoint.save(tmp_path / "m", world.model(kind=saved), manifest_of(world, own_llm=False, kind=saved), world.builder)
    projector = build_projector(wanted, WIDTH, HIDDEN)
    if wanted == saved:
        checkpoint.load_projector(projector, tmp_path / "m")
        assert torch.equal(projector[0].weight, world.model(kind=saved).projector[0].weight)
        return
    with pytest.raises(PipelineError, match=r"projector\.safetensors: does not fit"):
        checkpoint.load_projector(projector, tmp_path / "m")
