"""Every supervised turn of held-out rows as a question: what stands before it, the pictures shown by then, and its reference."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.records import Turn
from pipeline.text import PromptBuilder, TokenTable

WINDOW = 16_384  # rows


@dataclass(frozen=True, slots=True)
class Question:
    """One supervised turn.

    Attributes:
        row, turn: its row in the token table, and which of the row's supervised turns it is.
        prompt: int32 [T], all ids before the answer; reference: int32 [A], the answer and its end-of-turn token.
        asked: int32, the part of `prompt` behind the answer before it.
        image_start, slots: where the images within `prompt` begin, and their numbers among all of the table.
    """

    row: int
    turn: int
    prompt: np.ndarray
    asked: np.ndarray
    reference: np.ndarray
    image_start: np.ndarray
    slots: range


def row_windows(rows: int) -> Iterator[np.ndarray]:
    """Row numbers, so many at a time as are looked at together: what is held of each does not grow with the table."""
    return (np.arange(start, min(start + WINDOW, rows)) for start in range(0, rows, WINDOW))


def find_questions(table: TokenTable, rows: Iterable[int] | None = None) -> list[Question]:
    """Those of some rows, or of all, in order; ids are views into the file."""
    found = []
    for number in range(len(table)) if rows is None else rows:
        row, before = table.row(int(number)), 0
        for turn, (start, end) in enumerate(row.spans.tolist()):
            shown = int(np.searchsorted(row.image_start, start))
            slots = range(row.slots.start, row.slots.start + shown)
            asked = row.ids[before:start]
            found.append(Question(int(number), turn, row.ids[:start], asked, row.ids[start:end], row.image_start[:shown], slots))
            before = end
    return found


class Wording:
    """The text of a question, without what the chat template writes around it."""

    def __init__(self, builder: PromptBuilder) -> None:
        self._builder = builder
        self._first, self._later = self._frames()

    def __call__(self, question: Question) -> str:
        """The user's words; what stands before them too where the template's frame is another one than in a plain talk."""
        text = self._plain(question.asked)
        before, behind = self._later if question.turn else self._first
        text = text.removesuffix(behind)
        if not text.startswith(before):  # a system turn of the row's own: the user's turn begins behind it
            head, sign, rest = text.partition(self._later[0])
            text = rest if sign else head
        return text.removeprefix(before).strip()

    def _plain(self, ids: np.ndarray) -> str:
        return self._builder.decode(ids[ids != self._builder.image_id])

    def _frames(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """What the template writes before and behind the first question, and a later one."""
        sign = "Zq"
        talk = [Turn("user", (sign,)), Turn("assistant", (sign,))] * 2
        prompt = self._builder.build(talk)
        (first, end), (second, _) = np.asarray(prompt.spans).reshape(-1, 2).tolist()
        texts = self._plain(prompt.ids[:first]), self._plain(prompt.ids[end:second])
        found = [(before, behind) for before, _, behind in (text.rpartition(sign) for text in texts)]
        return found[0], found[1]


def describe(table: TokenTable, questions: Sequence[Question], builder: PromptBuilder) -> dict[str, list[Any]]:
    """What is shown and asked, a column each: where, turn, images (names), question, reference."""
    wording, names = Wording(builder), table.image_names()
    return {
        "where": [table.where(question.row) for question in questions],
        "turn": [question.turn for question in questions],
        "images": [names.slice(question.slots.start, len(question.slots)).to_pylist() for question in questions],
        "question": [wording(question) for question in questions],
        "reference": references_of(questions, builder),
    }


def references_of(questions: Sequence[Question], builder: PromptBuilder) -> list[str]:
    """The rows' own answers, blanks at the ends aside."""
    return [builder.decode(question.reference).strip() for question in questions]
