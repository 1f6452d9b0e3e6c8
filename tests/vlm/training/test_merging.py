"""Token merging through the stages: one extract serves every merge, cached = live, and chat follows the merged count."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PATCHES, ROWS, World
from projects import Project
from safetensors.torch import load_file

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.core import PipelineError, fingerprint
from pipeline.core.grid import mean_of_blocks
from pipeline.features import Encoder, FeatureStore

MERGES = ["none", "shuffle 2", "pool 2", "shuffle 4", "pool 4"]


@pytest.fixture
def project(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]) -> Project:
    monkeypatch.chdir(tmp_path)
    made = Project(world, tmp_path)
    made.write_pictures(png, ROWS)
    return made


def choose(project: Project, merge: str) -> int:
    """Set the merge; returns how many tokens an image has."""
    kind, _, factor = merge.partition(" ")
    project.set(f"projector.merge={kind}", f"projector.factor={factor or 1}")
    return PATCHES // int(factor or 1) ** 2


def weights(stage: str) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(Path("models", stage).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_one_extract_serves_every_merge_and_each_trains_and_answers(project: Project) -> None:
    project.run("extract")
    stored = {name: content for name, content in project.outputs().items() if "features" in name}
    for merge in MERGES:
        tokens = choose(project, merge)
        project.run("tokenize")
        table = project.table("sft")
        assert table.spec["tokens"] == tokens
        first = table.row(0).ids
        assert int((first == table.spec["image_id"]).sum()) == tokens
        assert project.run("pretrain")["steps"] == 3
        figures = project.run("sft")
        assert {"accuracy", "accuracy_blind", "loss"} <= figures.keys()
        assistant, talk = Assistant("models/sft", device="cpu"), Conversation()
        assistant.ask(talk, "What is this?", assistant.look(project.pictures / "0.png"))
        assert "".join(assistant.answer(talk, Sampling(max_new_tokens=4)))
    assert stored == {name: content for name, content in project.outputs().items() if "features" in name}


@pytest.mark.parametrize("merge", ["shuffle 2", "pool 4"])
def test_cached_equals_live_with_merging(project: Project, merge: str) -> None:
    choose(project, merge)
    project.run("extract", "tokenize", "pretrain", "sft")
    before = weights("pretrain"), weights("sft")
    project.set("pretrain.features=live", "sft.features=stored")
    project.run("pretrain", "sft")
    assert_equal(before[0], weights("pretrain"))
    assert_equal(before[1], weights("sft"))


def test_what_was_made_with_another_factor_is_named_and_not_used(project: Project) -> None:
    project.run("extract", "tokenize")
    choose(project, "shuffle 2")
    with pytest.raises(PipelineError, match="dvc repro tokenize"):
        project.run("pretrain")
    project.run("tokenize", "pretrain")
    choose(project, "pool 2")
    with pytest.raises(PipelineError, match=r"was trained with projector\.merge: shuffle, projector\.factor: 2"):
        project.run("sft")


def test_a_factor_without_a_merge_and_one_that_the_grid_has_not_stop_before_work(project: Project) -> None:
    project.set("projector.factor=2")
    with pytest.raises(PipelineError, match=r"projector\.merge is none"):
        project.run("extract")
    choose(project, "pool 3")
    project.run("extract")
    with pytest.raises(PipelineError, match="4 × 4 patches cannot be merged 3 × 3"):
        project.run("tokenize")


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_store_of_pooled_rows_is_a_quarter_and_equals_the_live_encoder(project: Project, storage: str) -> None:
    project.set("vision.pool=2", f"vision.storage={storage}", "projector.merge=pool", "projector.factor=2")
    project.run("extract", "tokenize", "pretrain")
    store = FeatureStore(Path("data/features"))
    assert store.tokens == PATCHES // 4
    assert project.table("sft").spec["tokens"] == PATCHES // 16
    before = weights("pretrain")
    project.set("pretrain.features=live")
    project.run("pretrain", "sft")
    assert_equal(before, weights("pretrain"))
    assistant = Assistant("models/sft", device="cpu")
    assert assistant.look(project.pictures / "0.png").shape[0] == PATCHES // 4


def test_pooled_features_are_means_of_what_the_encoder_gives(world: World, png: Callable[[int], bytes]) -> None:
    whole, pooled = (
        Encoder(world.clip.name, precision="float32", pool=pool, device=torch.device("cpu"), batch=2) for pool in (1, 2)
    )
    pixels = torch.from_numpy(whole.preprocess(png(3), where="3.png"))[None]
    exact = whole._forward(whole.tower, pixels, "float32")
    assert torch.equal(pooled.encode_files([png(3)], ["3.png"]), mean_of_blocks(exact, 2).to(torch.float16))
    assert fingerprint(whole.spec()) != fingerprint(pooled.spec())
    assert "pool" not in whole.spec()
    with pytest.raises(PipelineError, match=r"vision\.pool: a grid of 4 × 4 .* 3 × 3"):
        Encoder(world.clip.name, pool=3, device=torch.device("cpu"))
