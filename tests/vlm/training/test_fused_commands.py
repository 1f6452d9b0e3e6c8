"""What a person types, over a model of two joined encoders: each command answers as with one, or says in a line why not."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from made_benchmarks import rows_of, write_copy
from projects import Project
from ruamel.yaml import YAML
from test_fused import PAIR, fine, project  # noqa: F401
from typer.testing import CliRunner

from pipeline.advise import advise, as_lines
from pipeline.advise import command as advising
from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.look import look
from pipeline.chat.visitors import Exchange, Models, Visitors
from pipeline.check.command import app as check
from pipeline.doctor.leftovers import missing_models
from pipeline.export.__main__ import export
from pipeline.report.looking import add_heat
from pipeline.score.command import score
from pipeline.score.tasks import TASKS

MODEL = "models/pretrain"


def typed(command: Callable[..., None], *arguments: str) -> str:
    """The error of a command that must fail, in one line."""
    app = typer.Typer()
    app.command()(command)
    made = CliRunner().invoke(app, list(arguments))
    assert made.exit_code
    assert "Traceback" not in made.output
    [line] = [line for line in made.output.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(name="pair")
def trained_pair(project: Project) -> Project:  # noqa: F811
    """A trained model of a pair, and the params.yaml and dvc.yaml that made it."""
    project.set(PAIR)
    project.run("extract", "tokenize", "pretrain")
    with Path("params.yaml").open("w") as file:
        YAML().dump(project.content, file)
    Path("dvc.yaml").write_text("stages: {}\n")
    return project


@pytest.mark.usefixtures("pair")
def test_a_benchmark_is_scored_with_both_and_encodes_nothing_twice(
    png: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.chat.assistant.pick_precision", lambda *_: "float32")  # so that padding changes no word
    rows = rows_of("pope", 3)
    write_copy(Path("pope"), "pope", rows, png)
    app = typer.Typer()
    app.command()(score)
    stored = []
    for _ in range(2):
        made = CliRunner().invoke(app, [MODEL, "pope=pope"])
        assert made.exit_code == 0, made.output
        stored.append(sorted(path.name for path in Path(".dvc/features").rglob("*.h5")))
    assert stored[0] == stored[1]
    found = pq.read_table("results/score/pope/predictions.parquet").to_pylist()
    assistant = Assistant(MODEL, device="cpu")
    for asked, kept in zip(rows, found, strict=True):
        talk = Conversation()
        assistant.ask(talk, TASKS["pope"].question(asked).text, assistant.look_at(png(asked["picture"]), "x"))
        assert "".join(assistant.answer(talk, Sampling(TASKS["pope"].tokens))).strip() == kept["answer"]


def test_the_page_answers_as_chat_does(pair: Project, tmp_path: Path) -> None:
    picture = pair.pictures / "0.png"
    page = Visitors(Models([Path(MODEL)], lambda folder: Assistant(folder, device="cpu")), tmp_path / "brought")
    exchange = Exchange([str(picture)], "What is this?")
    for _ in page.ask(page.get("somebody"), exchange, page.models.names[0], Sampling(4)):
        pass
    assistant, talk = Assistant(MODEL, device="cpu"), Conversation()
    assistant.ask(talk, "What is this?", assistant.look(picture))
    assert "".join(assistant.answer(talk, Sampling(4))).strip() == exchange.answer
    assert not exchange.failed


def test_what_looks_back_or_exports_says_why_not(pair: Project) -> None:
    refused = "a model that joins 2 encoders is not looked back through -> train with one encoder"
    assert refused in typed(look, str(pair.pictures / "0.png"), "What is this?", "--model", MODEL, "--out", "seen.png")
    assert not Path("seen.png").exists()
    card = {"turn": 1, "pictures": ["x"], "names": ["0.png"], "asked": "What is this?", "said": "A circle."}
    cards = [dict(card), dict(card)]
    assert refused in add_heat(cards, pair.params.data.heldout, Path(MODEL))
    assert not any("heat" in each for each in cards)
    for kind in ([], ["--gguf"]):
        assert "no stock class joins 2 encoders" in typed(export, MODEL, "out", *kind)
    assert not Path("out").exists()


def test_costs_and_checks_are_those_of_both(pair: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advising, "SECONDS", 0.0)
    monkeypatch.setattr("pipeline.check.costs.ENOUGH", 0.0)
    found = advise(pair.params)
    assert found.shape.width == 64
    assert "data/models/clip + data/models/siglip" in "\n".join(as_lines(found))
    said = CliRunner().invoke(check, [])
    assert said.exit_code == 0, said.output
    assert "8 × [16, 64] float16 = 16.4 kB" in said.output


def test_each_of_them_is_missed(project: Project) -> None:  # noqa: F811
    project.set(PAIR)
    with Path("params.yaml").open("w") as file:
        YAML().dump(project.content, file)
    deps = ["data/models/clip", "data/models/siglip"]
    Path("dvc.yaml").write_text(json.dumps({"stages": {"extract": {"cmd": "x", "deps": deps}}}))
    assert not list(missing_models(project.folder))
    for name in deps:
        kept = Path(name).readlink()
        Path(name).unlink()
        [finding] = missing_models(project.folder)
        assert f"vision.model: {name} is no folder with a model" in str(finding)
        Path(name).symlink_to(kept)
