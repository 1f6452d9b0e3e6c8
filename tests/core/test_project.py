"""Commands work wherever one stands, and a project that has moved as a whole still finds its models."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import HIDDEN, WIDTH, World

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.core.errors import PipelineError
from pipeline.core.project import enter_project, in_project, named_by, project_of
from pipeline.vlm.model import Manifest, checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for name in ("data/models/clip", "models/sft", "docs/deep"):
        (folder / name).mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        (folder / name).write_text("a: 1\n")
    return folder


@pytest.mark.parametrize("stand", ["mine", "mine/docs/deep", ".", "/"])
def test_a_checkpoint_s_models_are_those_of_its_project(project: Path, stand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent / stand)
    folder = os.path.relpath(project / "models/sft") if stand != "/" else project / "models/sft"
    found = named_by(folder, "data/models/clip")
    assert found == ("data/models/clip" if stand == "mine" else str(project / "data/models/clip"))
    assert named_by(folder, "openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"
    assert named_by(folder, "/abs/models/clip") == "/abs/models/clip"
    monkeypatch.chdir("/")
    moved = project.rename(project.parent / "yours")
    assert named_by(moved / "models/sft", "data/models/clip") == str(moved / "data/models/clip")


def test_a_model_that_is_a_link_belongs_to_the_project_it_stands_in(project: Path, tmp_path: Path) -> None:
    shutil.move(project / "models/sft", tmp_path / "disk")
    (project / "models/sft").symlink_to(tmp_path / "disk")
    assert named_by(project / "models/sft", "data/models/clip") == str(project / "data/models/clip")


def test_paths_keep_their_meaning_when_a_command_goes_to_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert enter_project(reads=[Path("models/sft")], writes=[Path("out")]) == [Path("models/sft"), Path("out")]
    monkeypatch.chdir(project / "docs")
    found = enter_project(reads=[Path("deep"), Path("models/sft")], writes=[Path("out")])
    assert found == [project / "docs/deep", Path("models/sft"), project / "docs/out"]
    assert Path.cwd() == project
    monkeypatch.chdir(project.parent)
    assert enter_project(reads=[Path("mine/models/sft")]) == [project / "models/sft"]
    assert Path.cwd() == project
    assert project_of(Path("/nowhere/at/all")) is None


def test_a_folder_with_params_of_its_own_is_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text("a: 1\n")
    monkeypatch.chdir(tmp_path)
    assert enter_project(reads=[Path("x")]) == [Path("x")]
    assert Path.cwd() == tmp_path


def test_the_usual_model_is_found_from_within_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "docs")
    assert in_project(Path("models/sft")) == project / "models/sft"
    monkeypatch.chdir(project)
    assert in_project(Path("models/sft")) == Path("models/sft")
    assert in_project(Path("models/none")) == Path("models/none")


@pytest.mark.parametrize("command", [["params"], ["report"]])
def test_commands_without_paths_are_about_this_project(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{command[0]}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_trained_model_answers_from_anywhere_and_after_a_move(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]
) -> None:
    """Its manifest names the encoder and the frozen language model as params.yaml did, from the project's root."""
    project = tmp_path / "before"
    for name, model in (("clip", world.clip.name), ("llm", world.llm)):
        shutil.copytree(model, project / "data/models" / name)
    (tmp_path / "picture.png").write_bytes(png(0))
    monkeypatch.chdir(project)
    vision = {"model": "data/models/clip", "revision": "", "layer": -1, "spec": world.clip.spec()}
    llm = {"model": "data/models/llm", "revision": "", "image_token": "<image>"}
    manifest = Manifest(vision, llm, {"kind": "mlp", "width": WIDTH, "hidden": HIDDEN}, own_llm=False)
    checkpoint.save(Path("models/sft"), world.model("projector"), manifest, world.builder)

    def answer(model: str) -> str:
        assistant, talk = Assistant(model, device="cpu"), Conversation()
        assistant.ask(talk, "What is this?", assistant.look(tmp_path / "picture.png"))
        return "".join(assistant.answer(talk, Sampling(max_new_tokens=6)))

    wanted = answer("models/sft")
    for stand, model in (("data", "../models/sft"), ("/", str(project / "models/sft")), ("..", "before/models/sft")):
        monkeypatch.chdir(project / stand)
        assert answer(model) == wanted
    project.rename(tmp_path / "after")
    assert answer("after/models/sft") == wanted
    shutil.rmtree(tmp_path / "after/data")
    with pytest.raises(PipelineError, match="no such folder: data/models/clip"):
        answer("after/models/sft")
