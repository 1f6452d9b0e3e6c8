"""Every answer kept: what a row of predictions.parquet says, the figures of it, and which metrics are told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import World
from torch.nn import functional as F

from pipeline.features.sources import StoredFeatures
from pipeline.params import schema
from pipeline.params.schema import Dataset
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.sharing import find_sharing
from pipeline.vlm.evaluation import questions as windows
from pipeline.vlm.evaluation.choosing import choose_metrics
from pipeline.vlm.evaluation.corpus import Cider
from pipeline.vlm.evaluation.loss import heldout_loss, log_likelihoods
from pipeline.vlm.evaluation.metrics import METRICS
from pipeline.vlm.evaluation.predictions import make_table, writing_tables
from pipeline.vlm.evaluation.sources import source_names
from pipeline.vlm.evaluation.summary import summarise


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 200, 10_000])
@pytest.mark.parametrize("window", [4, 16_384])
def test_log_likelihoods_are_those_of_each_row_alone(
    world: World, shared: bool, micro_tokens: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", window)
    model, accelerator = world.model().eval(), Accelerator(mixed_precision="no", cpu=True)
    asked = Examples(world.table, StoredFeatures(world.store, world.table), world.builder.image_id)
    chosen = replace(asked, shared=find_sharing(world.table)) if shared else asked
    loss, found = log_likelihoods(model, chosen, accelerator, micro_tokens=micro_tokens)
    expected = list[float]()
    for number in range(len(world.table)):
        row = world.table.row(number)
        ids, places = torch.from_numpy(row.ids.astype(np.int64)), torch.tensor(row.image_start.tolist(), dtype=torch.long)
        features = asked.source.features(asked.source.load(np.array(row.slots, np.int64)))
        with torch.inference_mode():
            embedded = model.embed(ids[None], features, torch.zeros_like(places), places)
            scores = F.log_softmax(model.language_model(inputs_embeds=embedded).logits[0], -1)
        expected += [scores[token - 1, ids[token]].item() for start, end in row.spans.tolist() for token in range(start, end)]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert loss == pytest.approx(heldout_loss(model, chosen, accelerator, micro_tokens=micro_tokens), rel=1e-6)


def columns_of(answers: list[str], blind: list[str], references: list[str], **other: Any) -> dict[str, Any]:
    count = len(references)
    made = {
        "where": [f"data/rows.jsonl:{number + 1}" for number in range(count)],
        "source": ["data/rows.jsonl"] * count,
        "turn": [number % 2 for number in range(count)],
        "images": [[f"{number}.png"] for number in range(count)],
        "question": [f"What is {'this' if number % 3 else 'that'}?" for number in range(count)],
    }
    return made | {"answer": answers, "blind": blind, "reference": references} | other


def scores_of(path: Path, chosen: list[str], columns: dict[str, Any], **options: Any) -> dict[str, Any]:
    count = len(columns["reference"])
    with writing_tables(path) as write:
        for start in range(0, count, 7):
            part = {name: values[start : start + 7] for name, values in columns.items()}
            cut = {name: tuple(array[start : start + 7] for array in value) for name, value in options.items() if name == "choice"}
            likelihoods = [np.full(3, -0.5)] * len(part["reference"])
            write(make_table(part, likelihoods, chosen=chosen, **(options | cut)))
    return summarise(path, chosen, "why")


def test_rows_are_written_as_they_come_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    references = ["Red.", "Blue."] * 10
    columns = columns_of(["Red."] * 20, ["Blue."] * 20, references)
    for name in ("one", "other"):
        scores_of(tmp_path / name, ["exact", "vqa"], columns)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    file = pq.ParquetFile(tmp_path / "one")
    assert [file.metadata.row_group(number).num_rows for number in range(3)] == [7, 7, 6]
    table = file.read()
    assert {name: table[name].to_pylist() for name in columns} == columns
    assert table["exact"].to_pylist() == [1.0, 0.0] * 10
    assert table["blind_exact"].to_pylist() == table["blind_vqa"].to_pylist() == [0.0, 1.0] * 10


def test_figures_have_intervals_types_turns_sources_and_blind_beside_each(tmp_path: Path) -> None:
    references = [f"word {number}" for number in range(30)]
    half = [text if number % 2 else "no" for number, text in enumerate(references)]
    sources = ["one/*.jsonl"] * 10 + ["other"] * 20
    found = scores_of(tmp_path / "x", ["vqa", "exact"], columns_of(half, references, references, source=sources))
    assert found["by"] == "vqa"
    assert found["questions"] == 30
    assert found["metrics"]["exact"]["mean"] == found["metrics"]["vqa"]["mean"] == 0.5
    assert found["metrics"]["exact"]["low"] < 0.5 < found["metrics"]["exact"]["high"]
    assert found["metrics"]["vqa"]["blind"] == found["blind"]["mean"] == 1.0
    assert found["perplexity"] == pytest.approx(np.exp(0.5), abs=1e-3)
    assert {name: part["mean"] for name, part in found["turns"].items()} == {"0": 0.0, "1": 1.0}
    assert {name: part["questions"] for name, part in found["types"].items()} == {"what is": 30}
    assert {name: part["questions"] for name, part in found["sources"].items()} == {"one/*.jsonl": 10, "other": 20}
    assert all(part["low"] < part["mean"] < part["high"] for part in found["sources"].values())


def test_what_is_worth_nothing_is_said(tmp_path: Path) -> None:
    references = [f"{number % 4}" for number in range(400)]
    wrong, guess = ["x"] * 400, [text if number < 200 else "x" for number, text in enumerate(references)]
    luck = [text if 2 < number < 206 else "x" for number, text in enumerate(references)]

    def warnings(seen: list[str], blind: list[str], count: int = 400) -> list[str]:
        return list(scores_of(tmp_path / "x", ["exact"], columns_of(seen[:count], blind[:count], references[:count]))["warnings"])

    assert warnings(references, guess) == []
    assert warnings(references, wrong, 30) == ["only 30 questions: differences of some points are chance"]
    assert "not better than blind" in warnings(guess, guess)[0]
    assert "not better than blind" in warnings(wrong, guess)[0]
    assert "not clearly better than blind: 0.8% more may be chance, from -" in warnings(luck, guess)[0]
    assert "these questions tell their answers: without its pictures the model has 100.0%" in warnings(references, references)[1]


def test_rare_question_types_are_together(tmp_path: Path) -> None:
    questions = [f"kind {number} ?" for number in range(20) for _ in range(1 if number > 12 else 3)]
    count = len(questions)
    found = scores_of(tmp_path / "x", ["exact"], columns_of([""] * count, [""] * count, ["x"] * count, question=questions))
    assert sum(part["questions"] for part in found["types"].values()) == count
    assert (len(found["types"]), found["types"]["other"]["questions"]) == (13, 3 + 7)


def test_metrics_of_the_whole_set_and_of_options_have_columns_of_their_own(tmp_path: Path) -> None:
    references = ["a red circle on grass", "a blue square on sand", "a green dog in water"] * 3
    cider = Cider([text] for text in references)
    choice = np.array([1, 0, np.nan] * 3, np.float32)
    columns = columns_of(references, ["a"] * 9, references)
    found = scores_of(tmp_path / "x", ["token_f1", "cider", "choice"], columns, cider=cider, choice=(choice, 1 - choice))["metrics"]
    assert found["cider"]["mean"] == pytest.approx(10)
    assert found["cider"]["blind"] == 0
    assert {name: found["choice"][name] for name in ("mean", "blind", "questions")} == {"mean": 0.5, "blind": 0.5, "questions": 6}
    assert pq.read_table(tmp_path / "x")["choice"].null_count == 3


def test_yes_and_no_have_f1_and_the_share_of_yes(tmp_path: Path) -> None:
    references = ["Yes.", "No."] * 10
    found = scores_of(tmp_path / "x", ["exact", "yes_no"], columns_of(references, ["Yes."] * 20, references))["metrics"]["yes_no"]
    assert (found["mean"], found["yes_share"], found["questions"]) == (1.0, 0.5, 20)
    assert found["blind"] == pytest.approx(2 / 3, abs=1e-6)


OPTIONS = "What is it?\nA. red\nB. blue"
FITS: list[tuple[list[str], list[str], list[str]]] = [
    (["What?"] * 5, ["Red."] * 5, ["exact", "vqa", "contains"]),
    (["What?"] * 5, ["a red circle on the left"] * 5, ["exact", "token_f1", "anls"]),
    (["What?"] * 5, ["word " * 20] * 5, ["token_f1", "rouge_l", "cider"]),
    (["What?"] * 5, ["一个红色的圆形在一个蓝色的正方形旁边。"] * 5, ["token_f1", "rouge_l", "cider"]),
    (["Is it?"] * 5, ["Yes.", "No.", "Yes", "no", "Red."], ["exact", "vqa", "contains", "yes_no"]),
    (["Is it?"] * 5, ["Yes."] * 5, ["exact", "vqa", "contains"]),
    ([OPTIONS] * 5, ["B"] * 5, ["exact", "vqa", "contains", "choice"]),
    ([], [], ["exact", "vqa", "contains"]),
]


@pytest.mark.parametrize(("asked", "references", "chosen"), FITS)
def test_the_metrics_that_are_told_fit_the_answers(asked: list[str], references: list[str], chosen: list[str]) -> None:
    found, why = choose_metrics("auto", asked, references)
    assert found == chosen
    assert "median length of" in why
    assert choose_metrics(["cider"], asked, references) == (["cider"], "as evaluate.metrics names them")


def test_params_know_the_metrics() -> None:
    assert set(schema.METRICS) == {*METRICS, "cider", "yes_no", "choice"}


PLACES = [
    ("data/all/one.jsonl:7", "one.jsonl"), ("data/all/web/03.tar:dog.jpg", "web"), ("data/all/a/b/c.parquet:1", "a/**/*.parquet"),
    ("data/all/a/c.parquet:1", "a/**/*.parquet"), ("data/all/x/y/c.json:1", "data/all"), ("data/all/x/c.json:1", "x/*.json"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "source"), PLACES)
def test_a_row_is_of_the_source_that_its_file_belongs_to(where: str, source: str) -> None:
    mix = dict.fromkeys(["one.jsonl", "web", "a/**/*.parquet", "x/*.json"], 1.0)
    mixed = Dataset.model_validate({"records": "data/all", "images": "data", "mix": mix})
    assert source_names(mixed)(where) == source
    assert source_names(Dataset(records="data/all", images="data"))(where) == "data/all"
