"""`python -m pipeline.export import`: an export comes back as the checkpoint it was made from, or as an error of one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import PATCHES, World
from safetensors.torch import load_file, save_file
from test_export import KINDS, save, write

from pipeline.chat.assistant import Assistant
from pipeline.core.errors import PipelineError
from pipeline.export.restore import restore_model
from pipeline.export.source import Source
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.sources import StoredFeatures
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.model import checkpoint


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return {
        kind: save(folder / kind, world.clip, world.model("all", kind=kind), world.builder, kind=kind, llm=str(world.llm))
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def exports(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {kind: write(Source.open(model), folder / kind) for kind, model in trained.items()}


def loss(world: World, folder: Path) -> float:
    model, _ = checkpoint.load(folder)
    source = StoredFeatures(world.store, world.table)
    return heldout_loss(model, Examples(world.table, source, world.builder.image_id), Accelerator(cpu=True), micro_tokens=512)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_gives_the_same_checkpoint_and_the_same_loss(
    kind: str, trained: dict[str, Path], exports: dict[str, Path], world: World, tmp_path: Path
) -> None:
    restore_model(exports[kind], tmp_path / "back")
    for name in ("model.safetensors", "projector.safetensors"):
        before, after = load_file(trained[kind] / name), load_file(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert checkpoint.read_manifest(tmp_path / "back") == checkpoint.read_manifest(trained[kind])
    builders = [PromptBuilder(str(folder), image_token="<image>", tokens=PATCHES) for folder in (trained[kind], tmp_path / "back")]
    assert builders[0].spec() == builders[1].spec()
    assert loss(world, tmp_path / "back") == loss(world, trained[kind])


def test_a_mixture_of_experts_comes_back(world: World, moe_folder: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "m", world.clip, world.model("all", llm=moe_folder), world.builder, kind="mlp", llm=str(moe_folder))
    restore_model(write(Source.open(model), tmp_path / "out"), tmp_path / "back")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_encoder_comes_back_with_the_same_features(exports: dict[str, Path], world: World, tmp_path: Path) -> None:
    restore_model(exports["mlp"], tmp_path / "back", encoder=tmp_path / "clip")
    assert Encoder(str(tmp_path / "clip"), precision="float32", device=torch.device("cpu")).spec() == world.clip.spec()
    assert Assistant(tmp_path / "back").encoder.name == str(tmp_path / "clip")


@pytest.mark.parametrize(("family", "layer"), [("clip", -2), ("clip", 1), ("siglip", 2), ("siglip", -2)])
def test_an_encoder_cut_at_an_earlier_layer_gives_the_same_features(
    family: str, layer: int, vision_folders: dict[str, Path], world: World, tmp_path: Path
) -> None:
    encoder = Encoder(str(vision_folders[family]), layer=layer, precision="float32", device=torch.device("cpu"), batch=1)
    model = save(tmp_path / "m", encoder, world.model("all"), world.builder, kind="mlp", llm=str(world.llm))
    restore_model(write(Source.open(model), tmp_path / "out"), tmp_path / "back", encoder=tmp_path / "tower")
    picture = (world.folder / "images/1.png").read_bytes()
    found = Assistant(tmp_path / "back", device="cpu").encoder.encode_files([picture], ["1.png"])
    assert torch.equal(found, encoder.encode_files([picture], ["1.png"]))


def test_a_linear_projector_trained_further_as_two_layers_is_one_again(exports: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(exports["linear"], tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    second = torch.randn(tensors["multi_modal_projector.linear_2.weight"].shape, generator=torch.Generator().manual_seed(1))
    tensors |= {"multi_modal_projector.linear_2.weight": second, "multi_modal_projector.linear_2.bias": torch.ones(len(second))}
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    restore_model(tmp_path / "out", tmp_path / "back")
    model, _ = checkpoint.load(tmp_path / "back")
    first, bias = (tensors[f"multi_modal_projector.linear_1.{part}"] for part in ("weight", "bias"))
    features = torch.randn(5, first.shape[1], generator=torch.Generator().manual_seed(2))
    expected = (features @ first.T + bias) @ second.T + 1
    torch.testing.assert_close(model.projector(features), expected, rtol=1e-4, atol=1e-4)


def damaged(export: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(export, folder)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    elif damage == "marker":
        (folder / "glance_export.json").write_text("{")
    elif damage == "marker of nothing":
        manifest = {"vision": {}, "llm": {}, "projector": {}, "own_llm": True}
        (folder / "glance_export.json").write_text(json.dumps({"format": 1, "manifest": manifest}))
    elif damage == "other config":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    else:
        tensors = load_file(weights)
        tensor = tensors.pop(damage)
        if "linear_1" in damage:
            tensors[damage] = tensor[1:].contiguous()
        elif "class" in damage:
            tensors["audio_tower.weight"] = tensor
        save_file(tensors, weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", "model.safetensors: unreadable: "),
        ("gone", "no weights here"),
        ("marker", "glance_export.json: not an export: "),
        ("marker of nothing", "glance_export.json: not an export: 'model'"),
        ("other config", "is of no LLaVA or Idefics3 model"),
        ("multi_modal_projector.linear_1.weight", "not those of a mlp projector"),
        ("multi_modal_projector.linear_2.bias", "not those of a mlp projector: 'linear_2.bias'"),
        ("language_model.model.norm.weight", "missing keys: model.norm.weight"),
        ("vision_tower.vision_model.embeddings.class_embedding", "tensor audio_tower.weight belongs to no part"),
    ],
)
def test_a_damaged_export_is_refused_in_one_line(damage: str, words: str, exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        restore_model(damaged(exports["mlp"], tmp_path / "out", damage), tmp_path / "back")
    assert words in caught.value.line()
    assert not (tmp_path / "back").exists()


def test_a_folder_that_is_no_export_is_refused(trained: dict[str, Path], exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no export of this pipeline here"):
        restore_model(trained["mlp"], tmp_path / "back")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("x")
    with pytest.raises(PipelineError, match="not empty"):
        restore_model(exports["mlp"], tmp_path / "mine")
