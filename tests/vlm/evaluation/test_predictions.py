"""Every answer kept: what a row of predictions.parquet says, the figures of it, and the metrics' definitions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import ROWS, World
from torch.nn import functional as F

from pipeline.features.sources import StoredFeatures
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.sharing import find_sharing
from pipeline.vlm.evaluation.loss import heldout_loss, log_likelihoods
from pipeline.vlm.evaluation.metrics import METRICS, headline, normalise
from pipeline.vlm.evaluation.predictions import make_table, summarise, write_table
from pipeline.vlm.evaluation.questions import find_questions


def examples(world: World) -> Examples:
    return Examples(world.table, StoredFeatures(world.store, world.table), world.builder.image_id)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 200, 10_000])
def test_log_likelihoods_are_those_of_each_row_alone(world: World, shared: bool, micro_tokens: int) -> None:
    model, accelerator, asked = world.model().eval(), Accelerator(mixed_precision="no", cpu=True), examples(world)
    chosen = replace(asked, shared=find_sharing(world.table)) if shared else asked
    loss, found = log_likelihoods(model, chosen, accelerator, micro_tokens=micro_tokens)
    for number in range(len(world.table)):
        row = world.table.row(number)
        ids, places = torch.from_numpy(row.ids.astype(np.int64)), torch.tensor(row.image_start.tolist(), dtype=torch.long)
        features = asked.source.features(asked.source.load(np.array(row.slots, np.int64)))
        with torch.inference_mode():
            embedded = model.embed(ids[None], features, torch.zeros_like(places), places)
            scores = F.log_softmax(model.language_model(inputs_embeds=embedded).logits[0], -1)
        expected = [scores[token - 1, ids[token]].item() for start, end in row.spans.tolist() for token in range(start, end)]
        assert found[number] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert loss == pytest.approx(heldout_loss(model, chosen, accelerator, micro_tokens=micro_tokens), rel=1e-6)


def table_of(world: World, answers: list[str], blind: list[str]) -> pa.Table:
    questions = find_questions(world.table)
    likelihoods = [np.full(len(question.reference), -0.5, np.float32) for question in questions]
    return make_table(world.table, questions, world.builder, answers=answers, blind=blind, log_likelihood=likelihoods)


def test_a_row_says_what_was_shown_asked_and_answered(world: World, tmp_path: Path) -> None:
    references = [turn["content"] for row in ROWS for turn in row["messages"] if turn["role"] == "assistant"]  # type: ignore[attr-defined]
    asked = [turn["content"] for row in ROWS for turn in row["messages"] if turn["role"] == "user"]  # type: ignore[attr-defined]
    table = table_of(world, [f" {text}" for text in references], ["nothing"] * len(references))
    assert table["reference"].to_pylist() == references
    assert table["answer"].to_pylist() == references
    plain = ["".join(text.split("<image>")).split() for text in asked]
    assert [text.split() for text in table["question"].to_pylist()] == plain
    assert table["images"].to_pylist()[2] == ["2.png", "3.png"]
    two_turns = [n for n, place in enumerate(table["where"].to_pylist()) if place == world.table.where(8)]
    assert [table["images"].to_pylist()[n] for n in two_turns] == [["1.png"], ["1.png", "2.png"]], "shown by then, no more"
    assert table["turn"].to_pylist()[-4:] == [0, 1, 0, 0]
    assert set(table["exact"].to_pylist()) == {1.0}
    for name in ("one", "other"):
        write_table(tmp_path / name, table)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert pq.read_table(tmp_path / "one").equals(table)


def test_figures_have_intervals_types_turns_and_warnings(world: World) -> None:
    references = [text.strip() for text in table_of(world, [""] * 12, [""] * 12)["reference"].to_pylist()]
    half = [text if number % 2 else "no" for number, text in enumerate(references)]
    found = summarise(table_of(world, half, references))
    exact = found["metrics"]["exact"]
    assert exact["mean"] == pytest.approx(np.mean([a == r for a, r in zip(half, references, strict=True)]), abs=1e-6)
    assert exact["low"] < exact["mean"] < exact["high"]
    assert found["blind"]["mean"] == 1.0
    assert found["perplexity"] == pytest.approx(np.exp(0.5), abs=1e-3)
    assert set(found["turns"]) == {"0", "1"}
    assert sum(kind["questions"] for kind in found["types"].values()) == len(references)
    assert any("only 12 questions" in text for text in found["warnings"])
    assert any("not better than blind" in text for text in found["warnings"])
    assert not [text for text in summarise(table_of(world, references, half))["warnings"] if "blind" in text]


DEFINED = [  # worked out by hand from each metric's definition
    ("exact", " Red. ", "Red.", 1.0), ("exact", "red.", "Red.", 0.0),
    ("vqa", "A red circle", "red circle.", 1.0), ("vqa", "two", "2", 1.0), ("vqa", "1,000.5", "1000.5", 1.0),
    ("vqa", "t-shirt", "t shirt", 1.0), ("vqa", "green", "red", 0.0),
    ("contains", "The color of the triangle is red.", "Red.", 1.0), ("contains", "It is reddish.", "Red", 0.0),
    ("contains", "Anything", "", 0.0), ("contains", "circle red", "red circle", 0.0),
    ("token_f1", "a big red dog", "red dog runs", 2 / 3), ("token_f1", "", "", 1.0), ("token_f1", "x", "", 0.0),
    ("anls", "kitten", "sitting", 1 - 3 / 7), ("anls", "Paris ", "paris", 1.0), ("anls", "rome", "berlin", 0.0),
    ("anls", "", "", 1.0),
    ("rouge_l", "police kill the gunman", "police killed the gunman", 0.75),
    ("rouge_l", "the gunman kill police", "police killed the gunman", 0.5),
    ("rouge_l", "", "x", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "answer", "reference", "value"), DEFINED)
def test_a_metric_is_what_its_definition_says(metric: str, answer: str, reference: str, value: float) -> None:
    assert METRICS[metric](answer, reference) == pytest.approx(value)


def test_metrics_agree_with_plain_forms_of_themselves() -> None:
    """Against the slowest way to say the same, on 200 random pairs."""
    drawn, words = np.random.default_rng(0), ["red", "a", "Circle.", "two", "is", "the", "1,000", "blue,"]
    for _ in range(200):
        one, other = (" ".join(drawn.choice(words, drawn.integers(0, 7))) for _ in range(2))
        given, wanted = normalise(one).split(), normalise(other).split()
        windows = [given[at : at + len(wanted)] for at in range(len(given) - len(wanted) + 1)]
        assert METRICS["contains"](one, other) == float(bool(wanted) and wanted in windows)
        assert METRICS["anls"](one, other) == pytest.approx(METRICS["anls"](other, one))
        assert METRICS["token_f1"](one, other) == pytest.approx(METRICS["token_f1"](other, one))
        assert METRICS["vqa"](one, other) >= METRICS["exact"](one, other)
        assert all(0 <= metric(one, other) <= 1 for metric in METRICS.values())


@pytest.mark.parametrize(
    ("references", "first"),
    [(["Yes."] * 5, "exact"), (["a red circle on the left"] * 5, "exact"), (["word " * 20] * 5, "token_f1")],
)
def test_the_metrics_that_are_told_fit_the_length_of_the_answers(references: list[str], first: str) -> None:
    assert headline(references)[0] == first
    assert ("rouge_l" in headline(references)) == (len(references[0].split()) > 8)
