"""`sft.start`: the second training stage goes on from models/pretrain, or from a model that came back from elsewhere."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, ROWS, WIDTH, World
from safetensors.torch import load_file

from pipeline.core.checksums import record
from pipeline.core.errors import PipelineError
from pipeline.export.llava import write_model
from pipeline.export.marker import write_marker
from pipeline.export.processor import write_processor
from pipeline.export.restore import restore_model
from pipeline.export.source import Source
from pipeline.features.encoder.encoder import Encoder
from pipeline.minimind.exporting import export_folder
from pipeline.minimind.importing import Given, import_file
from pipeline.params.reading import check, override, read_yaml
from pipeline.params.stage_view import StageParams
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from stages import sft

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _project(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder in which the sft stage can run on the small world; models/pretrain is a trained model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/tokens").mkdir(parents=True)
    table = world.tokens(ROWS, "sft-start")
    for name in ("sft", "heldout"):
        shutil.copy(table.path, tmp_path / "data/tokens" / f"{name}.arrow")
        record(tmp_path / "data/tokens" / f"{name}.arrow")
    save(world, Path("models/pretrain"), kind="mlp")


def save(world: World, folder: Path, *, kind: str, own_llm: bool = True) -> None:
    torch.manual_seed(9)
    model = world.model("all", kind=kind)
    with torch.no_grad():
        for parameter in model.parameters() if own_llm else model.projector.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    vision = {"model": world.clip.name, "revision": "", "layer": -1, "precision": "float32", "spec": world.clip.spec()}
    llm = {"model": str(world.llm), "revision": "", "image_token": "<image>"}
    shape = {"kind": kind, "width": WIDTH, "hidden": HIDDEN}
    checkpoint.save(folder, model, Manifest(vision, llm, shape, own_llm=own_llm), world.builder)


def run(world: World, *assignments: str) -> list[dict[str, str]]:
    """The stage itself; returns its history."""
    content = read_yaml(ROOT / "params.yaml")
    for part in ("sft", "heldout"):
        content["data"][part] |= {"records": str(world.folder / "sft-start.jsonl"), "images": str(world.images.path)}
    given = [
        f"vision.model={world.clip.name}", "vision.precision=float32", f"llm.model={world.llm}", "sft.precision=float32",
        "sft.batch_size=4", "sft.epochs=2", "runtime.device=cpu", "runtime.extract_batch=4", "runtime.workers=0",
        "evaluate.max_new_tokens=2",
    ]  # fmt: skip
    override(content, [*given, *assignments])
    names = frozenset(["llm", "projector", "sft", "vision", "evaluate", "data", "runtime"])
    sft.main(StageParams(check(content, where="params.yaml"), names, "sft"))
    with Path("results/sft/history.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("kind", "way"),
    [("mlp", "Transformers"), ("linear", "Transformers"), ("norm_mlp", "Transformers"), ("linear", "MiniMind")],
)
def test_a_model_that_left_and_came_back_trains_on_at_the_same_loss(world: World, kind: str, way: str) -> None:
    save(world, Path("models/pretrain"), kind=kind)
    before = run(world, f"projector.kind={kind}")
    trained = load_file("models/sft/model.safetensors")
    if way == "Transformers":
        source, out = Source.open("models/pretrain"), Path("out")
        out.mkdir()
        write_model(source, out, "float32")
        write_processor(source, out)
        write_marker(out, source.manifest, dtype="float32")
        restore_model(out, Path("models/back"))
    else:
        text = (ROOT / "params.yaml").read_text().replace("data/models/clip", world.clip.name)
        Path("params.yaml").write_text(text.replace("precision: auto", "precision: float32", 1))
        export_folder(Path("models/pretrain"), Path("sft_vlm_32.pth"), dtype="float32")
        given = Given(heads=2, eps=1e-6, rope_theta=1e4, positions=512, image_token="<image>")
        tokenizer = Path("models/pretrain")
        import_file(Path("sft_vlm_32.pth"), Path("models/back"), given=given, tokenizer=tokenizer, as_checkpoint=True)
    shutil.rmtree("models/pretrain")
    after = run(world, f"projector.kind={kind}", "sft.start=models/back")
    assert float(after[0]["loss"]) == pytest.approx(float(before[0]["loss"]), rel=1e-6)
    assert after == before
    again = load_file("models/sft/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


def test_the_default_start_is_what_pretrain_writes_and_dvc_follows_it() -> None:
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    assert read_yaml(ROOT / "params.yaml")["sft"]["start"] in stages["pretrain"]["outs"]
    assert "${sft.start}" in stages["sft"]["deps"]
    assert "models/pretrain" not in stages["sft"]["deps"]


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("sft.start=models/none", "models/none: no model here"),
        ("projector.kind=linear", "models/other: has a mlp projector -> set projector.kind: mlp"),
        ("vision.layer=-2", r"models/other: was trained on other features than .* gives \(layer\) -> set .* vision.layer: -1"),
        ("vision.storage=int8", r"gives \(constants, storage\) -> set .* vision.storage: float16"),
    ],
)
def test_a_start_that_does_not_fit_the_params_is_one_line(world: World, assignment: str, said: str) -> None:
    Path("models/pretrain").rename("models/other")
    with pytest.raises(PipelineError, match=said) as caught:
        run(world, "sft.start=models/other", assignment)
    assert len(caught.value.line().splitlines()) == 1


def test_a_start_for_another_language_model_is_one_line(world: World, tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    save(world, Path("models/projector"), kind="mlp", own_llm=False)
    shutil.copytree(world.llm, tmp_path / "llm")
    with pytest.raises(PipelineError, match=r"models/projector: was trained for .* -> set llm.model: "):
        run(world, "sft.start=models/projector", f"llm.model={tmp_path / 'llm'}")
    Path("models/pretrain").rename("models/other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tokenizer_folders["embedded"] / name).read_text()
        (Path("models/other") / name).write_text(text.replace("<|endoftext|>", "<|finis|>"))
    with pytest.raises(PipelineError, match=r"models/other: its vocabulary is not that of .* -> set llm.model: models/other"):
        run(world, "sft.start=models/other")


def test_a_start_that_no_longer_fits_the_pipelines_own_pretrain_names_that_stage(world: World) -> None:
    with pytest.raises(PipelineError, match="models/pretrain: has a mlp projector -> dvc repro pretrain"):
        run(world, "projector.kind=linear")


def test_another_number_format_of_the_encoder_is_no_other_encoder(world: World) -> None:
    """Features differ in their last digits only; a model from a GPU can be trained on anywhere."""
    encoder = Encoder(world.clip.name, precision="bfloat16", device=torch.device("cpu"))
    assert encoder.spec() != world.clip.spec()
    assert run(world, "vision.precision=bfloat16")
