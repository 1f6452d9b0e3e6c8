"""Held-out questions worth a look, with their pictures: wrong and right ones, worst first, and those whose answer flipped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.check import thumbnail
from pipeline.core import PipelineError
from pipeline.params import Dataset
from pipeline.records import ImageError, Images, decode, open_dataset
from pipeline.report.answers import Answers, worst_first

PICTURES = 60  # in the whole page: with them it stays under 5 MB
SHOWN = 4  # pictures of one question
FLIPS, WRONG, RIGHT = 20, 24, 16  # questions of each kind, at most
LONG = 400  # letters of a text that are shown


@dataclass(frozen=True, slots=True)
class Column:
    """One run's answers beside the gallery's: `place` [N] is the row of the same question there, -1 where there is none."""

    label: str
    answers: Answers
    place: np.ndarray


@dataclass(frozen=True, slots=True)
class Gallery:
    """What the page draws: `cards` one a question, `flips` how many answers became right and wrong in each other run."""

    cards: list[dict[str, Any]]
    kinds: list[str]
    flips: list[dict[str, Any]]
    problem: str


def build_gallery(columns: Sequence[Column], dataset: Dataset | None, *, limit: int = 0) -> Gallery:
    """The first of `columns` says which questions; the others' answers stand beside.

    Args:
        dataset: where the pictures are; None: they are not shown.

    A picture that cannot be read costs its place, not the page: `problem` says why of the first.
    """
    first, others = columns[0], columns[1:]
    answers, flipped = first.answers, np.zeros(len(first.answers), bool)
    flips = []
    for other in others:
        there = other.place >= 0
        now = np.zeros(len(answers), bool)
        now[there] = other.answers.right[other.place[there]]
        gained, lost = there & now & ~answers.right, there & ~now & answers.right
        flipped |= gained | lost
        flips.append({"label": other.label, "shared": int(there.sum()), "gained": int(gained.sum()), "lost": int(lost.sum())})
    changed = worst_first(answers, np.flatnonzero(flipped), FLIPS)
    rest = ~flipped if others else np.ones(len(answers), bool)
    wrong = worst_first(answers, np.flatnonzero(rest & ~answers.right), WRONG)
    right = worst_first(answers, np.flatnonzero(rest & answers.right), RIGHT)
    numbers = sorted([*changed, *wrong, *right], key=lambda number: (-float(answers.surprise[number]), number))
    cards = [_card(row, number, columns, bool(flipped[number])) for row, number in zip(answers.rows(numbers), numbers, strict=True)]
    _write_answers(cards, numbers, columns)
    problem = draw(cards, dataset, limit=limit)
    return Gallery(cards, sorted({card["kind"] for card in cards}), flips, problem)


def _card(row: dict[str, Any], number: int, columns: Sequence[Column], flipped: bool) -> dict[str, Any]:
    answers = columns[0].answers
    likelihood = math.exp(-float(answers.surprise[number]))
    return {
        "where": row["where"],
        "turn": int(row["turn"]) + 1,
        "names": list(row["images"]),
        "question": shorten(row["question"]),
        "asked": row["question"],
        "said": row["answer"],
        "heat": None,
        "reference": shorten(row["reference"]),
        "blind": shorten(row["blind"]),
        "right": bool(answers.right[number]),
        "flipped": flipped,
        "kind": answers.kind_name(number),
        "likelihood": f"{likelihood:.2g}",
        "answers": [],
        "pictures": [],
    }


def _write_answers(cards: list[dict[str, Any]], numbers: list[int], columns: Sequence[Column]) -> None:
    for column in columns:
        there = [
            (card, int(column.place[number])) for card, number in zip(cards, numbers, strict=True) if column.place[number] >= 0
        ]
        rows = column.answers.rows([place for _, place in there])
        for (card, _), row in zip(there, rows, strict=True):
            card["answers"].append({"label": column.label, "text": shorten(row["answer"]), "right": row["exact"] == 1})


def draw(cards: list[dict[str, Any]], dataset: Dataset | None, *, limit: int = 0) -> str:
    """Put thumbnails into the cards, `PICTURES` distinct ones at most; returns why the first that is missing is."""
    if dataset is None or not any(card["names"] for card in cards):
        return ""
    try:
        images = open_dataset(dataset, limit=limit).images
    except PipelineError as error:
        return error.line()
    drawn: dict[str, str] = {}
    problem = ""
    for card in cards:
        for name in card["names"][:SHOWN]:
            if name not in drawn and len(drawn) < PICTURES:
                try:
                    drawn[name] = _thumbnail(images, name)
                except ImageError as error:
                    drawn[name], problem = "", problem or error.line()
            card["pictures"].append(drawn.get(name, ""))
    return problem


def _thumbnail(images: Images, name: str) -> str:
    return thumbnail(decode(images.read(name), where=images.place(name)))


def shorten(text: str) -> str:
    """A text as far as it is shown."""
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"
