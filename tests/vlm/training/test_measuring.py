"""What a stage measures on held-out rows: what is kept of each question, and that what is worth nothing is called so."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROWS, WIDTH, World, row

from pipeline.core.checksums import sign
from pipeline.params.reading import check, override, read_yaml
from pipeline.params.stage_view import StageParams
from pipeline.report.page import write_report
from pipeline.vlm.evaluation import questions as windows
from pipeline.vlm.evaluation.loss import log_likelihoods
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.training.assembly import TrainingRun, assemble
from pipeline.vlm.training.loop import train
from pipeline.vlm.training.measuring import measure_answers

ROOT = Path(__file__).parents[3]
NAMES = frozenset(["llm", "projector", "pretrain", "sft", "vision", "evaluate", "data", "runtime"])
Assemble = Callable[..., TrainingRun]


@pytest.fixture(name="make")
def make_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assemble:
    """A training stage put together on rows of the small world, in a folder of its own; nothing is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/features").symlink_to(world.folder / "features")

    def make(rows: list[dict[str, Any]], *overrides: str, trained: int = 0) -> TrainingRun:
        content = read_yaml(ROOT / "params.yaml")
        content["data"]["heldout"] |= {"records": str(world.folder / "measured.jsonl"), "images": str(world.images.path)}
        given = [
            f"vision.model={world.clip.name}", "vision.precision=float32", f"llm.model={world.llm}", "runtime.device=cpu",
            "runtime.extract_batch=4", "pretrain.precision=float32", "pretrain.train=all", "pretrain.batch_size=12",
            "pretrain.epochs=30", "pretrain.lr=5e-3", "evaluate.max_new_tokens=8", *overrides,
        ]  # fmt: skip
        override(content, given)
        params = check(content, where="params.yaml")
        tables = {"pretrain": world.tokens(rows[:trained] or rows, "trained"), "heldout": world.tokens(rows, "measured")}
        tokens = tmp_path / "data/tokens"
        shutil.rmtree(tokens, ignore_errors=True)
        tokens.mkdir()
        for name, table in tables.items():
            (tokens / f"{name}.arrow").write_bytes(table.path.read_bytes())
        sign(tokens)
        stage = StageParams(params, NAMES, "pretrain")
        return assemble(stage, params.pretrain, dataset=params.data.pretrain, name="pretrain", start=None)

    return make


def measure(run: TrainingRun) -> dict[str, Any]:
    _, likelihoods = log_likelihoods(run.model, run.heldout, run.accelerator, micro_tokens=500)
    figures = measure_answers(run, run.model, likelihoods)
    scores: dict[str, Any] = json.loads(Path("results/pretrain/scores.json").read_text())
    assert figures["accuracy"] == scores["exact"]["mean"]
    assert figures["accuracy_blind"] == scores["blind"]["mean"]
    assert figures["questions"] == scores["questions"]
    return scores


def said(role: str) -> list[str]:
    return [turn["content"] for row in ROWS for turn in row["messages"] if turn["role"] == role]  # type: ignore[attr-defined]


def test_a_row_says_what_was_shown_asked_and_answered(world: World, make: Assemble) -> None:
    run = make(ROWS)
    measure(run)
    table = pq.read_table("results/pretrain/predictions.parquet")
    assert table["reference"].to_pylist() == said("assistant")
    assert [text.split() for text in table["question"].to_pylist()] == [
        text.replace("<image>", "").split() for text in said("user")
    ]
    assert table["images"].to_pylist()[2] == ["2.png", "3.png"]
    assert [table["images"].to_pylist()[number] for number in (8, 9)] == [["1.png"], ["1.png", "2.png"]], "shown by then, no more"
    assert table["turn"].to_pylist() == [0] * 9 + [1, 0, 0]
    assert set(table["source"].to_pylist()) == {str(world.folder / "measured.jsonl")}
    assert table["where"].to_pylist()[8:10] == [f"{world.folder / 'measured.jsonl'}:9"] * 2
    _, likelihoods = log_likelihoods(run.model, run.heldout, run.accelerator, micro_tokens=500)
    assert [value for values in table["log_likelihood"].to_pylist() for value in values] == likelihoods.tolist()
    ends = [len(world.builder.encode([text]).ids) + 1 for text in said("assistant")]
    assert [len(values) for values in table["log_likelihood"].to_pylist()] == ends


def test_windows_change_nothing_but_the_row_groups(make: Assemble, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = Path("results/pretrain/predictions.parquet"), "What?\nA. red\nB. blue"
    rows = [*ROWS, row(f"<image>{options}", "A", "0.png"), row(options, "B")]
    run = make(rows, "evaluate.metrics=[exact, cider, yes_no, choice]")
    whole_scores, whole = measure(run), pq.read_table(path)
    assert set(whole_scores["metrics"]) == {"exact", "cider", "yes_no", "choice"}
    monkeypatch.setattr(windows, "WINDOW", 3)
    assert measure(run) == whole_scores
    assert pq.ParquetFile(path).num_row_groups == 5
    parts, each = pq.read_table(path), "log_likelihood"
    assert parts.drop([each]).equals(whole.drop([each]))
    # the rows of a window decide how wide its batches are padded, and some builds of torch round by that
    assert parts[each].combine_chunks().flatten().to_pylist() == pytest.approx(
        whole[each].combine_chunks().flatten().to_pylist(), abs=1e-5
    )


def test_two_runs_leave_the_same_bytes(make: Assemble) -> None:
    left = []
    for _ in range(2):
        measure(make(ROWS, "evaluate.metrics=[exact, cider, yes_no]"))
        left.append({path.name: path.read_bytes() for path in Path("results/pretrain").glob("*.*")})
        for path in Path("results/pretrain").glob("*.*"):
            path.unlink()
    assert {"predictions.parquet", "scores.json"} <= left[0].keys()
    assert left[0] == left[1]


def test_which_metrics_and_how_many_rows_is_said(make: Assemble, capsys: pytest.CaptureFixture[str]) -> None:
    scores = measure(make(ROWS, "evaluate.limit=5"))
    assert (scores["questions"], list(scores["metrics"])) == (5, ["contains", "exact", "vqa"])
    told = r"pretrain: held-out answers, by the answers' median length of [1-3] words?, with 95 % .*exact 0.00% \("
    assert re.search(told, capsys.readouterr().out)
    measure(make(ROWS, "evaluate.metrics=[rouge_l]"))
    assert "as evaluate.metrics names them, with 95 % intervals: rouge_l" in capsys.readouterr().out


THINGS = ["Red.", "Blue.", "Yes.", "No.", "A square.", "A circle."]
SEEN = [row(f"<image>\nWhat is this? {number // 6 % 2}", THINGS[number % 6], f"{number % 6}.png") for number in range(120)]
TOLD = [row(f"<image>\nIs it {THINGS[number % 6]}", THINGS[number % 6], f"{number // 6 % 6}.png") for number in range(120)]


def first_screen(scores: dict[str, Any]) -> str:
    """The text of the report above its curves."""
    Path("metrics").mkdir(exist_ok=True)
    figures = {"accuracy": scores["exact"]["mean"], "accuracy_blind": scores["blind"]["mean"], "questions": scores["questions"]}
    Path("metrics/pretrain.json").write_text(json.dumps(figures))
    Path(".dvc").mkdir(exist_ok=True)
    if not Path(".dvc/plots").exists():
        Path(".dvc/plots").symlink_to(ROOT / ".dvc/plots")
    write_report(Path("report.html"), [])
    body = Path("report.html").read_text().partition("<body>")[2]
    return body.partition("<h2>")[0]


@pytest.mark.slow
def test_a_model_whose_projector_is_drawn_anew_and_questions_that_need_no_picture_are_called_out(make: Assemble) -> None:
    run = make(SEEN, trained=12)  # type: ignore[arg-type]
    train(run.model, run.examples, run.schedule, run.accelerator)
    scores = measure(run)
    assert scores["exact"]["mean"] > 0.9
    assert scores["blind"]["mean"] < 0.4
    assert re.findall('class="bad">(.*?)<', first_screen(scores)) == ["no figures: the stage has not run"], "sft; nothing else"
    torch.manual_seed(1)
    run.model.projector = build_projector("mlp", WIDTH, run.model.hidden_size)
    broken = first_screen(measure(run))
    assert "not better than blind" in broken or "not clearly better than blind" in broken
    told = make(TOLD, "pretrain.epochs=18", trained=36)  # type: ignore[arg-type]
    train(told.model, told.examples, told.schedule, told.accelerator)
    scores = measure(told)
    assert scores["exact"]["mean"] > 0.9, "as good a figure as the sound model's"
    screen = first_screen(scores)
    assert "not better than blind" in screen or "not clearly better than blind" in screen
    assert "these questions tell their answers" in screen
