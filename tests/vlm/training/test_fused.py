"""Several encoders joined in the channel: a store each, cached = live, and everything behind them follows."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CPU, PATCHES, ROWS, WIDTH, World
from projects import Project
from safetensors.torch import load_file
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel
from typer.testing import CliRunner

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.check.costs import encoder_shape, extraction_rate
from pipeline.core import PipelineError
from pipeline.export.source import Source
from pipeline.features import Encoder, FeatureStore, FusedEncoder, common_tokens
from pipeline.features.__main__ import app
from pipeline.minimind.exporting import export_folder
from pipeline.project.models import list_model_folders
from pipeline.vlm.model import checkpoint

PAIR = "vision.model=[data/models/clip, data/models/siglip]"
WIDE = 24  # width of the encoder with a finer grid


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP of 64 pixels and 8 × 8 patches, twice as fine as those of the other two."""
    folder = tmp_path_factory.mktemp("fine")
    torch.manual_seed(5)
    config = SiglipVisionConfig(
        hidden_size=WIDE, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def project(
    world: World,
    vision_folders: dict[str, Path],
    fine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    png: Callable[[int], bytes],
) -> Project:
    monkeypatch.chdir(tmp_path)
    made = Project(world, tmp_path)
    for name, folder in (("siglip", vision_folders["siglip"]), ("fine", fine)):
        (tmp_path / "data/models" / name).symlink_to(folder)
    made.write_pictures(png, ROWS)
    return made


def weights(stage: str) -> dict[str, torch.Tensor]:
    paths = sorted(Path("models", stage).glob("*.safetensors"))
    return {f"{path.name}/{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_pair_whose_members_are_stored_encodes_nothing_and_shares_their_files(project: Project) -> None:
    alone: dict[str, set[int]] = {}
    for name in ("clip", "siglip"):
        project.set(f"vision.model=data/models/{name}")
        assert project.run("extract")["encoded"] == 8
        alone[name] = {path.stat().st_ino for path in Path("data/features").glob("*.h5")}
    project.set(PAIR)
    figures = project.run("extract")
    assert (figures["images"], figures["encoded"]) == (8, 0)
    for number, name in enumerate(("clip", "siglip"), start=1):
        assert {path.stat().st_ino for path in Path("data/features", str(number)).glob("*.h5")} == alone[name]
    assert not list(Path("data/features").glob("*.h5")), "what one encoder left is gone"
    project.set("vision.model=[data/models/siglip, data/models/clip]")
    assert project.run("extract")["encoded"] == 0
    project.set("vision.model=data/models/clip")
    assert project.run("extract")["encoded"] == 0
    assert [path.name for path in Path("data/features").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_joined_rows_equal_both_live_encoders_bit_for_bit(project: Project, storage: str) -> None:
    project.set("vision.model=[data/models/clip, data/models/fine]", "vision.pool=[1, 2]", f"vision.storage={storage}")
    project.set("projector.merge=shuffle", "projector.factor=2")
    stages = ("pretrain", "sft") if storage == "float16" else ("pretrain",)
    project.run("extract", "tokenize", *stages)
    assert project.table("sft").spec["tokens"] == PATCHES // 4
    manifest = checkpoint.read_manifest("models/pretrain")
    assert manifest.projector["width"] == WIDTH + WIDE
    assert [part["model"] for part in manifest.encoders] == ["data/models/clip", "data/models/fine"]
    before = {stage: weights(stage) for stage in stages}
    project.set("pretrain.features=live", "sft.features=stored")
    project.run(*stages)
    assert all(same(before[stage], weights(stage)) for stage in stages)


def test_chat_sees_with_all_of_them_and_a_changed_one_is_named(project: Project, vision_folders: dict[str, Path]) -> None:
    project.set(PAIR)
    project.run("extract", "tokenize", "pretrain")
    assistant, talk = Assistant("models/pretrain", device="cpu"), Conversation()
    seen = assistant.look(project.pictures / "0.png")
    data = (project.pictures / "0.png").read_bytes()
    alone = [Encoder(str(folder), precision="float32", device=CPU, batch=4) for folder in vision_folders.values()]
    assert torch.equal(seen, torch.cat([each.encode_files([data], ["0.png"])[0] for each in alone], dim=1))
    assistant.ask(talk, "What is this?", seen)
    assert "".join(assistant.answer(talk, Sampling(max_new_tokens=4)))
    Path("data/models/siglip").unlink()
    Path("data/models/siglip").symlink_to(vision_folders["clip"])
    with pytest.raises(PipelineError, match="data/models/siglip has changed since training"):
        Assistant("models/pretrain", device="cpu")


def test_what_one_encoder_or_another_pair_trained_is_not_gone_on_from(project: Project) -> None:
    project.run("extract", "tokenize", "pretrain")
    project.set(PAIR)
    with pytest.raises(PipelineError, match=r"other features .*the number of encoders"):
        project.run("sft")
    with pytest.raises(PipelineError, match="no feature store"):
        project.run("pretrain")
    project.run("extract", "pretrain")
    project.set("vision.model=[data/models/siglip, data/models/clip]")
    Path("models/pretrain").rename("models/other")  # which dvc repro would not make anew
    project.set("sft.start=models/other")
    with pytest.raises(PipelineError, match=r"set vision.model: \['data/models/clip', 'data/models/siglip'\], vision.layer: -1,"):
        project.run("sft")
    with pytest.raises(PipelineError, match="features were made with"):
        project.run("pretrain")


def test_an_unfinished_run_of_another_pair_is_not_taken_up(encoders: dict[str, Encoder]) -> None:
    clip, siglip = encoders["clip"], encoders["siglip"]
    specs = [FusedEncoder(pair).row_spec() for pair in ([clip, siglip], [siglip, clip])] + [clip.row_spec()]
    assert len({str(spec) for spec in specs}) == 3


@pytest.mark.parametrize("found", [
    ([("a", 196, 1), ("b", 256, 1)], "a gives 14 × 14 patches and b gives 16 × 16 patches", "take checkpoints of equal grids"),
    ([("a", 256, 1), ("b", 1024, 1)], "a gives 16 × 16 patches and b gives 32 × 32 patches", "set vision.pool: [1, 2]"),
    ([("a", 64, 2), ("b", 144, 2)], "a gives 8 × 8 patches and b gives 12 × 12 patches", "set vision.pool: [2, 3]"),
    ([("a", 36, 1), ("b", 144, 1), ("c", 36, 2)], "a gives 6 × 6", "set vision.pool: [1, 2, 2]"),
    ([("a", 36, 1), ("b", 50, 1)], "a gives 36 patches and b gives 50 patches", "take checkpoints of equal grids"),
])  # fmt: skip
def test_unequal_grids_are_refused_with_what_makes_them_equal(found: tuple[list[tuple[str, int, int]], str, str]) -> None:
    members, problem, remedy = found
    with pytest.raises(PipelineError) as caught:
        common_tokens(members)
    assert problem in caught.value.what
    assert remedy in caught.value.remedy


def test_unequal_grids_stop_before_anything_is_encoded_and_the_cost_is_that_of_all(project: Project) -> None:
    project.set("vision.model=[data/models/clip, data/models/fine]")
    for ask in (lambda: encoder_shape(project.params), lambda: project.run("extract")):
        with pytest.raises(PipelineError, match=r"4 × 4 patches and data/models/fine gives 8 × 8"):
            ask()
    assert not list(Path(".dvc").rglob("*.h5"))
    project.set("vision.pool=[1, 2]")
    shape = encoder_shape(project.params)
    assert (shape.tokens, shape.width, shape.row) == (PATCHES, WIDTH + WIDE, PATCHES * (WIDTH + WIDE) * 2)
    rate = extraction_rate(project.params, [(project.pictures / "0.png").read_bytes()])
    assert rate is not None
    assert rate.images > 0


def test_both_stores_are_verified_and_shown(project: Project) -> None:
    project.set(PAIR)
    project.run("extract")
    Path("params.yaml").write_text("{}")
    Path("dvc.yaml").write_text("{}")
    run = CliRunner().invoke(app, ["verify"])
    assert (run.exit_code, run.output.count("every byte as it was written")) == (0, 2)
    run = CliRunner().invoke(app, ["info"])
    assert all(f"data/features/{number}: 8 images" in run.output for number in (1, 2))
    shard = next(Path("data/features/2").glob("*.h5"))
    content = bytearray(shard.read_bytes())
    content[FeatureStore(Path("data/features/2")).shards[0].offset] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    assert CliRunner().invoke(app, ["verify"]).exit_code == 4


def test_no_export_takes_a_pair(project: Project) -> None:
    project.set(PAIR)
    project.run("extract", "tokenize", "pretrain")
    with pytest.raises(PipelineError, match="no stock class joins 2 encoders"):
        Source.open("models/pretrain")
    with pytest.raises(PipelineError, match="MiniMind-V has one encoder, this model joins 2"):
        export_folder(Path("models/pretrain"), Path("out.pth"), dtype="float32")


@pytest.mark.usefixtures("project")
def test_glance_use_takes_the_pair_out_of_dvc_yaml_and_puts_one_in() -> None:
    before = {"vision": ["data/models/clip", "data/models/siglip"], "llm": ["data/models/llm"]}
    deps = ["data/models/clip", "data/models/siglip", "data/models/llm", "stages/x.py"]
    dvc = {"stages": {stage: {"deps": list(deps)} for stage in ("extract", "tokenize", "pretrain", "sft")}}
    params = {"vision": {"model": "data/models/fine"}, "llm": {"model": "data/models/llm"}}
    list_model_folders(params, dvc, before)
    assert dvc["stages"]["pretrain"]["deps"] == ["data/models/fine", "data/models/llm", "stages/x.py"]
    params["vision"]["model"] = ["data/models/clip", "data/models/fine"]  # type: ignore[assignment]
    list_model_folders(params, dvc, {"vision": ["data/models/fine"], "llm": ["data/models/llm"]})
    assert dvc["stages"]["sft"]["deps"] == ["data/models/clip", "data/models/fine", "data/models/llm", "stages/x.py"]


def test_a_damaged_list_of_encoders_is_no_model(project: Project) -> None:
    project.set(PAIR)
    project.run("extract", "tokenize", "pretrain")
    shutil.copytree("models/pretrain", "broken")
    manifest = Path("broken/glance.json")
    (Path("broken") / "checksums.json").unlink()
    for vision in ('{"members": []}', '{"members": [3]}', "[]", '{"members": {}}'):
        manifest.write_text(
            '{"format": 1, "vision": VISION, "llm": {}, "projector": {}, "own_llm": false}'.replace("VISION", vision)
        )
        with pytest.raises(PipelineError, match="not a model"):
            checkpoint.read_manifest("broken")
