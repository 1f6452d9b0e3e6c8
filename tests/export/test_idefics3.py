"""SigLIP, shuffled patches and one matrix leave as Idefics3: stock Transformers gives the pipeline's ids, logits and answers."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, HIDDEN, PATCHES, WIDTH, World
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Idefics3ImageProcessorPil, SiglipImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from pipeline.chat.assistant import Assistant
from pipeline.core.errors import PipelineError
from pipeline.export import check, idefics3, proof
from pipeline.export.llamacpp import check_runnable
from pipeline.export.marker import write_marker
from pipeline.export.proof import HeldOut, heldout_rows
from pipeline.export.publish import write_stock
from pipeline.export.restore import restore_model
from pipeline.export.source import Source
from pipeline.features.encoder.encoder import Encoder
from pipeline.params.schema import Dataset
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.language_model import load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.standard import _positions, require_idefics3
from pipeline.vlm.model.vlm import VisionLanguageModel

pytestmark = pytest.mark.skipif(
    type(Idefics3ImageProcessorPil).__name__ == "DummyObject", reason="Idefics3 needs torchvision in this Transformers"
)


def trained(
    world: World, encoder: Encoder, folder: Path, *, kind: str = "linear_nobias", merge: str = "shuffle", factor: int = 2
) -> Source:
    """A checkpoint as training writes it."""
    torch.manual_seed(6)
    projector = build_projector(kind, encoder.width, HIDDEN, merge, factor)
    model = VisionLanguageModel(projector, load_language_model(str(world.llm)))
    builder = PromptBuilder(str(world.llm), image_token="<image>", tokens=encoder.tokens // factor**2)
    vision = {"model": encoder.name, "revision": "", "layer": encoder.layer, "precision": "float32", "spec": encoder.spec()}
    shape = {"kind": kind, "width": encoder.width, "hidden": HIDDEN} | ({"merge": merge, "factor": factor} if factor > 1 else {})
    manifest = Manifest(vision, {"model": str(world.llm), "revision": "", "image_token": "<image>"}, shape, own_llm=True)
    checkpoint.save(folder, model, manifest, builder)
    return Source.open(folder)


def encoder_of(folder: Path, *, layer: int = -1) -> Encoder:
    return Encoder(str(folder), layer=layer, precision="float32", device=CPU, batch=1)


@pytest.fixture(scope="module")
def rows(world: World) -> list[HeldOut]:
    return heldout_rows(Dataset(records=str(world.folder / "rows.jsonl"), images=str(world.images.path)), 4)


def written(source: Source, folder: Path) -> Path:
    folder.mkdir()
    write_stock(source, folder, "float32")
    write_marker(folder, source.manifest, dtype="float32")
    return folder


def prove(source: Source, export: Path, rows: Sequence[HeldOut], work: Path) -> proof.Proof:
    """As `pipeline.export.proof.prove`, in this process."""
    work.mkdir()
    expected = proof.ask(source, rows, work, max_new_tokens=8)
    check.main(str(export), work)
    return proof.compare(source, rows, work, expected, max_new_tokens=8)


@pytest.mark.parametrize(("merge", "factor"), [("shuffle", 2), ("shuffle", 4), ("none", 1)])
def test_stock_idefics3_gives_the_pipelines_ids_logits_and_answer(
    merge: str, factor: int, world: World, vision_folders: dict[str, Path], rows: list[HeldOut], tmp_path: Path
) -> None:
    source = trained(world, encoder_of(vision_folders["siglip"]), tmp_path / "m", merge=merge, factor=factor)
    found = prove(source, written(source, tmp_path / "out"), rows, tmp_path / "work")
    assert (found.model_class, found.rows, found.other_ids) == ("Idefics3ForConditionalGeneration", 4, 0)
    assert any(len(row.pictures) > 1 for row in rows), "several pictures in a conversation are among them"
    assert found.largest <= 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["scale_factor"], config["image_token_id"]) == (factor, source.builder.image_id)
    assert str(tmp_path) not in json.dumps(config)
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert "model.connector.modality_projection.proj.weight" in names
    assert not any("head." in name and "lm_head" not in name for name in names)


def test_pictures_of_any_size_give_the_same_pixels(world: World, vision_folders: dict[str, Path], tmp_path: Path) -> None:
    source = trained(world, encoder_of(vision_folders["siglip"]), tmp_path / "m")
    processor = AutoProcessor.from_pretrained(written(source, tmp_path / "out"), backend="pil")
    ours = source.encoder.preprocess
    for seed, size in enumerate([(32, 32), (90, 41), (33, 200), (7, 9)]):
        noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(noise.numpy()).save(file, "PNG")
        found = processor(text="<image>", images=Image.open(io.BytesIO(file.getvalue())), return_tensors="pt")
        assert found["input_ids"][0].tolist() == [source.builder.image_id] * (PATCHES // 4)
        mean, std = (torch.tensor(getattr(processor.image_processor, key))[:, None, None] for key in ("image_mean", "image_std"))
        back = (found["pixel_values"][0, 0] * std + mean) / ours.rescale
        assert torch.equal(back.round().to(torch.uint8), torch.from_numpy(ours(file.getvalue(), where="here")))


def test_an_export_comes_back_bit_for_bit_with_its_encoder(
    world: World, vision_folders: dict[str, Path], rows: list[HeldOut], tmp_path: Path
) -> None:
    source = trained(world, encoder_of(vision_folders["siglip"]), tmp_path / "m")
    restore_model(written(source, tmp_path / "out"), tmp_path / "back", encoder=tmp_path / "siglip")
    one, other = (load_file(folder / "projector.safetensors") for folder in (tmp_path / "m", tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    back = Assistant(tmp_path / "back", device="cpu")
    assert back.encoder.name == str(tmp_path / "siglip")
    assert back.builder.spec() == source.builder.spec()
    settings = [json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("back", "m")]
    assert settings[0] == settings[1]
    picture = rows[0].pictures[0]
    assert torch.equal(back.look_at(picture, "a picture"), source.assistant.look_at(picture, "a picture"))
    ours, theirs = source.language_model.state_dict(), back.model.language_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"kind": "linear"}, "one matrix without bias, not a linear projector", "linear_nobias"),
        ({"kind": "mlp"}, "not a mlp projector", "linear_nobias"),
        ({"merging": ("pool", 2)}, "no class pools patches", "projector.merge: shuffle"),
        ({"family": "clip_vision_model"}, "takes a SigLIP encoder, this is a clip", "SigLIP"),
        ({"layer": 1}, "the last hidden state only", "vision.layer: -1"),
        ({"grid": 25}, "two rows of a 25 × 25 grid one position", "another picture size"),
    ],
)
def test_what_idefics3_has_no_place_for_is_refused(changes: dict[str, Any], problem: str, remedy: str) -> None:
    given = {"kind": "linear_nobias", "merging": ("shuffle", 2), "family": "siglip_vision_model", "layer": -1, "grid": 14}
    require_idefics3(**given)  # type: ignore[arg-type]
    with pytest.raises(PipelineError) as caught:
        require_idefics3(**given | changes)
    assert problem in caught.value.what
    assert remedy in caught.value.remedy


def test_other_merged_models_and_gguf_are_refused_before_anything_is_written(
    world: World, vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = trained(world, encoder_of(vision_folders["clip"]), tmp_path / "m")
    with pytest.raises(PipelineError, match="takes a SigLIP encoder, this is a clip"):
        written(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(PipelineError, match="tokens around a picture"):
        check_runnable(source)


def test_an_encoder_that_crops_its_pictures_is_refused(world: World, vision_folders: dict[str, Path], tmp_path: Path) -> None:
    source = trained(world, encoder_of(vision_folders["siglip"]), tmp_path / "m")
    source.encoder.name = str(tmp_path)
    SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=True, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match="crops or pads"):
        idefics3.check_exportable(source)


def test_every_grid_is_refused_whose_rows_idefics3_mixes_up() -> None:
    """Against the class's own embeddings: a table of positions that is the number of the position."""
    for grid in (14, 16, 25, 27, 29, 32):
        config = Idefics3VisionConfig(hidden_size=1, num_attention_heads=1, image_size=2 * grid, patch_size=2)
        embeddings = Idefics3VisionEmbeddings(config)
        with torch.inference_mode():
            embeddings.position_embedding.weight.copy_(torch.arange(grid**2)[:, None])
            embeddings.patch_embedding.bias.zero_()
            found = embeddings(torch.zeros(1, 3, 2 * grid, 2 * grid), torch.ones(1, grid, grid, dtype=torch.bool))
        exact = found.flatten().tolist() == list(range(grid**2))
        assert exact == (_positions(grid) == list(range(grid))), grid
        assert exact == (grid not in (25, 29))


def test_the_matrix_is_that_of_the_class(world: World, vision_folders: dict[str, Path], tmp_path: Path) -> None:
    source = trained(world, encoder_of(vision_folders["siglip"]), tmp_path / "m")
    model, _, wrong = check.load(written(source, tmp_path / "out"))
    assert not wrong
    features = torch.randn(3, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.model.connector(features), source.model.projector(features))
