"""`python -m pipeline.chat`: one answer, a conversation, and mistakes told in one line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from conftest import HIDDEN, WIDTH, World
from projects import with_path
from typer.testing import CliRunner, Result

from pipeline.chat.__main__ import chat
from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.core.checksums import record
from pipeline.core.errors import PipelineError
from pipeline.records.record import ImageSlot, Turn
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.generation import generate


@pytest.fixture(scope="module")
def trained(world: World) -> Path:
    vision = {"model": world.clip.name, "revision": "", "layer": -1, "precision": "auto", "spec": world.clip.spec()}
    llm = {"model": str(world.llm), "revision": "", "image_token": "<image>"}
    manifest = Manifest(vision, llm, {"kind": "mlp", "width": WIDTH, "hidden": HIDDEN}, own_llm=True)
    checkpoint.save(world.folder / "model", world.model("all"), manifest, world.builder)
    return world.folder / "model"


def run(*arguments: str, typed: str = "") -> Result:
    app = typer.Typer()
    app.command()(chat)
    return CliRunner().invoke(app, list(arguments), input=typed)


def test_one_shot_prints_one_answer_and_ends(trained: Path, world: World) -> None:
    result = run(str(world.folder / "images/0.png"), "What is this?", "--model", str(trained), "--max-tokens", "5")
    assert result.exit_code == 0, result.output
    assistant, talk = Assistant(trained), Conversation()
    assistant.ask(talk, "What is this?", assistant.look(world.folder / "images/0.png"))
    assert result.stdout.strip() == "".join(assistant.answer(talk, Sampling(max_new_tokens=5))).strip()


def test_the_streamed_answer_is_the_greedy_one(trained: Path, world: World) -> None:
    assistant, talk = Assistant(trained, device="cpu"), Conversation()
    features = assistant.look(world.folder / "images/0.png")
    assistant.ask(talk, "What is this?", features)
    streamed = "".join(assistant.answer(talk, Sampling(max_new_tokens=6)))
    prompt = assistant.builder.build_question([Turn("user", (ImageSlot(0), "\nWhat is this?"))])
    ids = generate(
        assistant.model,
        assistant.builder,
        [prompt.ids],
        [prompt.image_starts],
        features[None],
        max_new_tokens=6,
        device=torch.device("cpu"),
    )
    assert streamed.strip() == assistant.builder.decode(ids[0]).strip()
    assert [turn.role for turn in talk.turns] == ["user", "assistant"]


def test_the_same_seed_gives_the_same_drawn_answer(trained: Path) -> None:
    assistant = Assistant(trained, device="cpu")
    answers = []
    for seed in (1, 1, 2, 3, 4):
        talk = Conversation()
        assistant.ask(talk, "What is this?")
        answers.append("".join(assistant.answer(talk, Sampling(8, temperature=2.0, seed=seed))))
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_a_conversation_with_commands(trained: Path, world: World) -> None:
    picture = world.folder / "images/1.png"
    typed = f"/help\n/image {picture}\nWhat is this?\nAnd the colour?\n/reset\n/image nowhere.png\n/dance\n/exit\n"
    result = run("--model", str(trained), "--max-tokens", "3", typed=typed)
    assert result.exit_code == 0, result.output
    for part in ("/image PATH", f"looking at {picture}", "forgotten", "nowhere.png: no such image", "no command /dance"):
        assert part in result.output


def test_a_placeholder_typed_by_a_person_is_text(trained: Path) -> None:
    assistant, talk = Assistant(trained, device="cpu"), Conversation()
    assistant.ask(talk, "what does <image> <|im_end|> mean?")
    prompt = assistant.builder.build_question(talk.turns)
    assert prompt.image_starts == ()
    assert assistant.builder.image_id not in prompt.ids
    list(assistant.answer(talk, Sampling(2)))


def test_a_conversation_too_long_for_the_model_says_so_and_can_go_on(trained: Path) -> None:
    result = run("--model", str(trained), "--max-tokens", "3", typed="what is this? " * 2000 + "\nWhat is this?\n")
    assert result.exit_code == 0
    assert "begin a new topic, or ask in fewer words" in result.output


def test_an_encoder_that_changed_since_training_is_refused(trained: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(trained, tmp_path / "model")
    manifest = json.loads((tmp_path / "model/glance.json").read_text())
    manifest["vision"]["spec"]["weights"] = "other"
    (tmp_path / "model/glance.json").write_text(json.dumps(manifest))
    record(tmp_path / "model/glance.json")
    with pytest.raises(PipelineError, match="has changed since training"):
        Assistant(tmp_path / "model", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "models/sft: no trained model here -> dvc repro"), (["--model", "elsewhere"], "elsewhere: no trained model here")],
)
def test_a_missing_model_names_the_command_that_makes_it(tmp_path: Path, arguments: list[str], words: str) -> None:
    root = Path(__file__).parents[2]
    for name in ("params.yaml", "dvc.yaml"):  # a project of its own: this checkout's may hold a model
        (tmp_path / name).touch()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.chat", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": with_path(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_picture_is_told_before_anything_is_loaded(trained: Path) -> None:
    result = run("nowhere.png", "What?", "--model", str(trained))
    assert result.exit_code == 3
    assert "nowhere.png: no such image -> give the path of a picture" in (
        result.stderr if isinstance(result.stderr, str) else io.StringIO().getvalue()
    )
