"""`python -m pipeline.look`: the answer on the terminal, its words' heat maps in a PNG."""

from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from conftest import World
from PIL import Image
from test_chat import trained  # noqa: F401
from typer.testing import CliRunner

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.look import look, look_back


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(look)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_question_about_two_pictures_becomes_a_sheet(project: Path, trained: Path, world: World) -> None:
    pictures = [str(world.folder / f"images/{number}.png") for number in (0, 1)]
    made = run(*pictures, "What is this?", "--model", str(trained), "--max-tokens", "4", "--out", "there/seen.png")
    assert made.exit_code == 0, made.output
    assistant, talk = Assistant(trained, device="cpu"), Conversation()
    assistant.ask(talk, "What is this?", [assistant.look(picture) for picture in pictures])
    answer = "".join(assistant.answer(talk, Sampling(4))).strip()
    assert made.stdout.startswith(answer)
    assert "rollout: attention, traced back" in made.stdout
    assert "gradient: pixels" in made.stdout
    with Image.open(project / "there/seen.png") as sheet:
        assert sheet.format == "PNG"
        assert len(set(np.asarray(sheet.convert("RGB")).reshape(-1, 3).max(1).tolist())) > 20


def test_what_is_looked_back_at_leaves_the_next_answer_as_it_is(trained: Path, world: World) -> None:
    assistant, data = Assistant(trained, device="cpu"), (world.folder / "images/0.png").read_bytes()

    def answered() -> Conversation:
        talk = Conversation()
        assistant.ask(talk, "What is this?", assistant.look_at(data, "one"))
        list(assistant.answer(talk, Sampling(4)))
        return talk

    before = answered()
    seen = look_back(assistant, before.turns, [data], ["rollout", "gradient", "tokens"])
    assert {maps.heat.shape for maps in seen.maps} == {(len(seen.words), 1, 4, 4)}
    assert answered().turns == before.turns


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0.png", "What?", "--out", "seen.jpg"], "seen.jpg: expected a name that ends in .png"),
        (["0.png", "What?", "--out", "kept.png"], "kept.png: is a folder -> set --out to the name of a file"),
        (["0.png", "What?", "--out", "x" * 300 + ".png"], ".png: File name too long"),
        (["0.png", "What?", "--by", "magic"], "--by magic: no such way of looking -> take rollout, gradient or tokens"),
        (["What?"], "expected a picture and a question"),
        (["0.png", " "], "expected a picture and a question"),
        (["nowhere.png", "What?"], "nowhere.png: no such image"),
        (["0.png", "What?", "--model", "elsewhere"], "elsewhere: no trained model here"),
    ],
)
def test_a_mistake_is_one_line(
    project: Path, trained: Path, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(project / "0.png")
    (project / "kept.png").mkdir()
    made = run(*(["--model", str(trained)] if "--model" not in arguments else []), *arguments)
    assert made.exit_code != 0
    error = made.stderr or capfd.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not made.stdout  # told before a model has answered
    assert not (project / "look.png").exists()
