"""Prompts, scores and figures are those of lmms-eval 0.7.3: its own functions gave lmms_eval_figures.json for the same rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_benchmarks import COUNT, answers_to, rows_of

from pipeline.score import answers, figures
from pipeline.score.tasks import TASKS

THEIRS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "lmms_eval_figures.json").read_text(encoding="utf-8"))
tasks = pytest.mark.parametrize("name", TASKS)


def asked(name: str) -> list[Any]:
    return [TASKS[name].question({**row, "image": {"bytes": b"", "path": None}}) for row in rows_of(name)]


def scored(name: str, said: list[str] | None = None) -> figures.Scored:
    questions = asked(name)
    said = answers_to(name, rows_of(name)) if said is None else said
    units = [question.unit or f"#{number}" for number, question in enumerate(questions)]
    return figures.Scored(
        np.array([TASKS[name].score(answer, question) for answer, question in zip(said, questions, strict=True)]),
        said,
        [question.reference for question in questions],
        [question.group for question in questions],
        np.unique(np.array(units), return_inverse=True)[1],
    )


@tasks
def test_prompts_are_lmms_evals(name: str) -> None:
    found = "\0".join(question.text for question in asked(name))
    assert hashlib.sha256(found.encode()).hexdigest() == THEIRS[name]["prompts"]


@tasks
def test_scores_of_200_rows_are_lmms_evals(name: str) -> None:
    found = scored(name)
    assert len(found.scores) == COUNT
    assert 0.05 < found.scores.mean() < 0.95, "rows of which all are right or wrong would show nothing"
    if name != "mmbench":  # of which lmms-eval tells pairs and categories only
        assert found.scores == pytest.approx(THEIRS[name]["scores"])


@tasks
def test_figures_are_lmms_evals(name: str) -> None:
    found, theirs = scored(name), THEIRS[name]
    made = TASKS[name].figures(found)
    ones = np.ones(found.units.max() + 1)
    for figure in made.keys() & theirs.keys():
        assert made[figure](ones) == pytest.approx(theirs[figure]), figure
    if name == "mmbench":
        groups = np.array([found.groups[np.flatnonzero(found.units == unit)[0]] for unit in range(len(ones))])
        assert {group: found.whole[groups == group].mean() for group in set(groups.tolist())} == pytest.approx(theirs["groups"])
    elif not made.keys() & theirs.keys():
        assert made["accuracy"](ones) == pytest.approx(np.mean(theirs["scores"]))


def test_a_share_of_yes_is_that_of_the_answers() -> None:
    found = scored("pope", ["Yes"] * 150 + ["no"] * 40 + ["maybe"] * 10)
    assert figures.yes_no(found)["yes"](np.ones(COUNT)) == pytest.approx(0.75)


def test_intervals_hold_the_figure_and_narrow_with_the_questions() -> None:
    found = scored("gqa")
    silent = scored("gqa", [""] * COUNT)
    whole = figures.summarise(TASKS["gqa"].figures, found, silent)["figures"]["accuracy"]
    assert whole["low"] < whole["value"] < whole["high"]
    assert whole["blind"] == 0.0
    expected = 1.96 * found.scores.std() / np.sqrt(COUNT)  # of a mean
    assert (whole["high"] - whole["low"]) / 2 == pytest.approx(expected, rel=0.15)


def test_questions_of_one_unit_are_drawn_together() -> None:
    """200 pairs with the same answer twice are 200 draws, not 400: the interval is that of 200."""
    once = np.random.default_rng(1).integers(0, 2, 200).astype(float)
    many = [""] * 400
    twice = figures.Scored(np.repeat(once, 2), many, many, many, np.repeat(np.arange(200), 2))
    single = figures.Scored(once, many[:200], many[:200], many[:200], np.arange(200))
    pairs, alone = (figures.summarise(figures.accuracy, each, each)["figures"]["accuracy"] for each in (twice, single))
    assert pairs == alone


def test_a_model_that_sees_nothing_and_a_handful_of_questions_are_called_out() -> None:
    few = figures.Scored(np.ones(9), ["yes"] * 9, ["yes"] * 9, [""] * 9, np.arange(9))
    warnings = figures.summarise(figures.accuracy, few, few)["warnings"]
    assert "only 9 questions" in warnings[0]
    assert "blind" in warnings[1]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", ""),
        ("(C) or (A)", "A"),
        ("The answer is B.", "B"),
        ("It is a man: D", "D"),
        ("", ""),
        ("!?", ""),
        ("Dogs", "D"),
    ],
)
def test_letters_are_found_where_they_stand(answer: str, letter: str) -> None:
    assert answers.pick_letter(answer, "ABCD") == letter


def test_vqa_counts_agreement_of_ten_people() -> None:
    assert answers.soft_accuracy("red", ["red"] * 10) == 1.0
    assert answers.soft_accuracy("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert answers.soft_accuracy("green", ["red"] * 10) == 0.0
