"""`glance score` over local copies: every task in both layouts, pictures encoded once, every answer kept, mistakes in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import typer
from conftest import World
from made_benchmarks import rows_of, write_copy
from scored_models import make_project, save_model
from test_published import write_published
from typer.testing import CliRunner, Result

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.features.encoder.encoder import Encoder
from pipeline.score.benchmark import Benchmark
from pipeline.score.command import score
from pipeline.score.tasks import TASKS

ROWS = 12  # each its own picture


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(score)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that have gone through the encoder."""
    names: list[str] = []
    begin = Encoder.begin

    def noted(self: Encoder, pixels: torch.Tensor, shown: list[str]) -> Any:
        names.extend(shown)
        return begin(self, pixels, shown)

    monkeypatch.setattr(Encoder, "begin", noted)
    return names


@pytest.fixture
def folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pipeline.chat.assistant.pick_precision", lambda *_: "float32")  # so that padding changes no word
    monkeypatch.setattr("pipeline.score.figures.DRAWS", 50)
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, replace(task, tokens=3))
    make_project(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    save_model(world, tmp_path / "models/one", seed=1)
    return tmp_path


def test_all_tasks_are_asked_and_every_answer_is_kept(folder: Path, png: Callable[[int], bytes], encoded: list[str]) -> None:
    for name in TASKS:
        write_copy(folder / "data/benchmarks" / name, name, rows_of(name, 4), png)
    result = run("models/one", *TASKS)
    assert result.exit_code == 0, result.output
    assert len(encoded) == 4, "the same four pictures in eleven benchmarks"
    for name, task in TASKS.items():
        out = folder / "results/score" / name
        rows = pq.read_table(out / "predictions.parquet").to_pylist()
        questions = [task.question({**row, "image": {"bytes": b"1"}}) for row in rows_of(name, 4)]
        assert json.loads((out / "scores.json").read_text())["questions"] == len(rows) == 4, name
        assert [row["question"].split() for row in rows] == [asked.text.split() for asked in questions], name
        assert [row["reference"] for row in rows] == [asked.reference.strip() for asked in questions], name
        assert [row["score"] for row in rows] == [
            task.score(row["answer"], asked) for row, asked in zip(rows, questions, strict=True)
        ]
        assert [row["group"] for row in rows] == [asked.group for asked in questions]
        assert all(len(row["images"]) == 1 and row["log_likelihood"] for row in rows)
    kept = sorted(path.name for path in (folder / "results/score/pope").iterdir())
    assert kept == ["checksums.json", "predictions.parquet", "scores.json"]


@pytest.mark.parametrize("name", TASKS)
def test_both_layouts_give_the_same_questions_and_pictures(tmp_path: Path, png: Callable[[int], bytes], name: str) -> None:
    rows, found = rows_of(name, 50), []
    for saved in (False, True):
        write_copy(tmp_path / str(saved), name, rows, png, saved=saved)
        benchmark = Benchmark(name, tmp_path / str(saved))
        asked = list(benchmark.questions())
        found.append(([each.question for each in asked], [benchmark.images.read(each.picture[0]) for each in asked]))
    assert found[0] == found[1]
    assert found[0][1] == [png(row["picture"]) for row in rows]
    assert found[0][0] == [TASKS[name].question({**row, "image": {"bytes": b"1"}}) for row in rows]


def test_answers_are_chats_and_blind_ones_see_no_picture(folder: Path, png: Callable[[int], bytes]) -> None:
    rows = rows_of("pope", 3)
    write_copy(folder / "pope", "pope", rows, png)
    assert run("models/one", "pope=pope").exit_code == 0
    found = pq.read_table(folder / "results/score/pope/predictions.parquet").to_pylist()
    assistant, nothing = Assistant(folder / "models/one", device="cpu"), torch.zeros(16, 32, dtype=torch.float16)
    for row, kept in zip(rows, found, strict=True):
        for column, shown in (("answer", assistant.look_at(png(row["picture"]), "x")), ("blind", nothing)):
            talk = Conversation()
            assistant.ask(talk, TASKS["pope"].question(row).text, shown)
            assert "".join(assistant.answer(talk, Sampling(TASKS["pope"].tokens))).strip() == kept[column]


def test_another_model_encodes_no_picture_again(
    world: World, folder: Path, png: Callable[[int], bytes], encoded: list[str]
) -> None:
    save_model(world, folder / "models/two", seed=2)
    write_copy(folder / "pope", "pope", rows_of("pope", ROWS), png)
    for model in ("one", "two", "one"):
        assert run(f"models/{model}", "pope=pope", "--out", f"out/{model}").exit_code == 0
        assert len(encoded) == ROWS
    answers = [pq.read_table(folder / "out" / model / "pope/predictions.parquet")["answer"].to_pylist() for model in ("one", "two")]
    assert answers[0] != answers[1], "two models, or the test shows nothing"


@pytest.mark.slow
def test_5000_questions_about_500_pictures_for_three_experiments_encode_each_picture_once(
    world: World, folder: Path, png: Callable[[int], bytes], encoded: list[str]
) -> None:
    rows = [{**row, "picture": number % 500} for number, row in enumerate(rows_of("pope", 5000))]
    write_copy(folder / "pope", "pope", rows, png)
    for seed, name in enumerate(("one", "two", "three"), 1):
        save_model(world, folder / "models" / name, seed=seed)
        assert run(f"models/{name}", "pope=pope", "--out", f"out/{name}").exit_code == 0
        assert json.loads((folder / "out" / name / "pope/scores.json").read_text())["questions"] == 5000
    assert len(encoded) == 500


def test_the_same_run_gives_the_same_bytes_in_parts_of_any_size(
    folder: Path, png: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_copy(folder / "mme", "mme", rows_of("mme", ROWS), png)
    kept = []
    for out, part in (("a", 8192), ("b", 8192), ("c", 5)):
        monkeypatch.setattr("pipeline.score.scoring.PART", part)
        assert run("models/one", "mme=mme", "--out", out).exit_code == 0
        kept.append([folder / out / "mme" / name for name in ("predictions.parquet", "scores.json")])
    assert [path.read_bytes() for path in kept[0]] == [path.read_bytes() for path in kept[1]]
    whole, parts = (pq.read_table(paths[0]).drop_columns(["log_likelihood"]) for paths in (kept[0], kept[2]))
    assert whole.equals(parts)
    assert kept[0][1].read_bytes() == kept[2][1].read_bytes()


def test_a_share_keeps_pairs_together(folder: Path, png: Callable[[int], bytes]) -> None:
    write_copy(folder / "mme", "mme", rows_of("mme"), png)
    units = [asked.question.unit for asked in Benchmark("mme", "mme", share=0.3).questions()]
    assert 30 < len(units) < 90
    assert all(units.count(unit) == 2 for unit in units)


def test_a_stage_of_the_pipeline_writes_what_dvc_shows(folder: Path, png: Callable[[int], bytes]) -> None:
    write_copy(folder / "pope", "pope", rows_of("pope", ROWS), png)
    (folder / "score/params.yaml").write_text("model: models/one\nshare: 1.0\ntasks: {pope: pope}\n")
    result = run("--stage", "pope")
    assert result.exit_code == 0, result.output
    figures = json.loads((folder / "metrics/score/pope.json").read_text())["pope"]
    kept = json.loads((folder / "results/score/pope/scores.json").read_text())
    assert figures["questions"] == ROWS
    assert {name: figures[name] for name in kept["figures"]} == {name: each["value"] for name, each in kept["figures"].items()}
    assert {"accuracy_low", "accuracy_high", "accuracy_blind", "f1", "yes"} <= figures.keys()


def changed(name: str, **columns: Any) -> Callable[[Path, Callable[[int], bytes]], None]:
    """A copy whose third row has other values; None takes a column away."""

    def write(folder: Path, png: Callable[[int], bytes]) -> None:
        rows = rows_of(name, 4)
        rows[2] |= columns
        write_copy(folder, name, rows, png)

    return write


def without(name: str, column: str) -> Callable[[Path, Callable[[int], bytes]], None]:
    def write(folder: Path, png: Callable[[int], bytes]) -> None:
        write_copy(folder, name, [{key: value for key, value in row.items() if key != column} for row in rows_of(name, 4)], png)

    return write


def no_file(folder: Path, _: Callable[[int], bytes]) -> None:
    folder.mkdir()


def other_split(folder: Path, png: Callable[[int], bytes]) -> None:
    write_copy(folder, "pope", rows_of("pope", 2), png)
    for file in folder.rglob("test-*"):
        file.unlink()


def cut_short(folder: Path, png: Callable[[int], bytes]) -> None:
    write_copy(folder, "pope", rows_of("pope", 4), png)
    file = min(folder.rglob("test-*"))
    file.write_bytes(file.read_bytes()[:-20])


def no_picture(folder: Path, png: Callable[[int], bytes]) -> None:
    write_copy(folder, "pope", rows_of("pope", 4), lambda number: b"no picture" if number == 2 else png(number))


def lost_picture(folder: Path, png: Callable[[int], bytes]) -> None:
    """As POPE's authors publish it."""
    write_published(folder, "pope", png)
    max(folder.rglob("*.jpg")).unlink()


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("pope", no_file, "no .parquet and no .arrow file here"),
        ("pope", other_split, "no split 'test', found train"),
        ("pope", without("pope", "category"), "no column 'category', which pope has"),
        ("pope", changed("pope", answer=""), "no answer to compare with"),
        ("vqav2", changed("vqav2", answers=[], multiple_choice_answer=""), "score its split validation"),
        ("gqa", changed("gqa", imageId="n99"), "picture 'n99' is not in testdev_balanced_images"),
        ("ai2d", changed("ai2d", answer="7"), "not a row of ai2d: the answer is option 7"),
        ("seed", changed("seed", answer="F"), "its answer is 'F', expected A, B, C, D"),
        ("pope", changed("pope", answer="perhaps"), "expected yes, no"),
        ("pope", changed("pope", question="What is this? " * 300), "the model holds 512"),
        ("pope", cut_short, "not a readable Parquet file"),
        ("pope", no_picture, "not a picture in a known format"),
        ("pope", lost_picture, "no such image"),
    ],
)
def test_a_copy_that_cannot_be_scored_is_one_line(
    folder: Path, png: Callable[[int], bytes], name: str, write: Callable[..., None], said: str
) -> None:
    write(folder / "copy", png)
    result = run("models/one", f"{name}=copy")
    assert result.exit_code != 0
    assert said in result.output
    assert "Traceback" not in result.output
    assert not (folder / "results/score" / name).exists(), "no figures of a part"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which model, on which tasks?"),
        (["models/one"], "which model, on which tasks?"),
        (["models/one", "vqa"], "no task 'vqa'"),
        (["models/one", "pope"], "no such folder"),
        (["models/one", "pope=a", "pope=b"], "stands twice"),
        (["models/none", "pope=pope"], "no model here"),
        (["models/one", "pope=pope", "--share", "0"], "a share of 0 asks nothing"),
        (["models/one", "pope=pope", "--out", "."], "pope: is not empty and not an earlier score"),
        (["--stage", "mme"], "task mme has no folder"),
    ],
)
def test_mistakes_are_one_line(folder: Path, png: Callable[[int], bytes], arguments: list[str], said: str) -> None:
    write_copy(folder / "pope", "pope", rows_of("pope", 2), png)
    result = run(*arguments)
    assert result.exit_code != 0
    assert said in result.output
    assert "Traceback" not in result.output
