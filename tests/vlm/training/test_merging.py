"""Token merging through the stages: one extract serves every merge, cached = live, and chat follows the merged count."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PATCHES, ROWS, World, row
from projects import Project
from safetensors.torch import load_file

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.core.errors import PipelineError

MERGES = ["none", "shuffle 2", "pool 2", "shuffle 4", "pool 4"]


@pytest.fixture
def project(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]) -> Project:
    monkeypatch.chdir(tmp_path)
    made = Project(world, tmp_path)
    for number in range(8):
        (made.pictures / f"{number}.png").write_bytes(png(number))
    for name in ("pretrain", "sft"):
        made.write(f"{name}.jsonl", ROWS)
    made.write("heldout.jsonl", [row("<image>\nWhat is this?", "A circle.", f"{number}.png") for number in (6, 7)])
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
