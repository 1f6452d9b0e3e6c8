"""Multiple choice by likelihood: of the options that a question lists, the one that the model thinks most likely to follow.

A question lists its options as lines that begin with a letter: "A. red", "(B) blue" or "C: green". A letter that generation
never says, or says in other words, does not make an answer wrong here.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator

from pipeline.features import FeatureSource
from pipeline.text import SCHEMA, PromptBuilder, TokenTable, write_tokens
from pipeline.vlm.batches import Examples, find_sharing
from pipeline.vlm.evaluation.loss import log_likelihoods
from pipeline.vlm.evaluation.questions import Question
from pipeline.vlm.model import VisionLanguageModel

_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_LETTER = re.compile(r"^(\(?)([A-Z])([.):]?)(?=\s|$)[ \t]*(.*)$", re.DOTALL)
BATCH = 1024  # candidates that are tokenised together


def find_options(question: str, reference: str) -> tuple[list[str], int] | None:
    """The answers that a question offers, spelt as its reference is (a letter, the option's words, or both), and which of
    them that is. None where it offers none, or none that is the reference.
    """
    listed = _OPTION.findall(question)
    listed = listed[max((place for place, (letter, _) in enumerate(listed) if letter == "A"), default=0) :]
    if len(listed) < 2 or [letter for letter, _ in listed] != [chr(ord("A") + place) for place in range(len(listed))]:
        return None
    found = _LETTER.match(reference.strip())
    if found is not None and ord(found[2]) - ord("A") < len(listed):
        before, right, behind, text = found.groups()
        answers = [f"{before}{letter}{behind}" + (f" {words}" if text else "") for letter, words in listed]
        place = ord(right) - ord("A")
    else:
        answers = [words for _, words in listed]
        place = answers.index(reference.strip()) if reference.strip() in answers else -1
    return (answers, place) if place >= 0 and answers[place] == reference.strip() else None


@dataclass(frozen=True, slots=True)
class Choice:
    """A question that can be asked as multiple choice: its number, the ids of each answer [A], which is right."""

    number: int
    answers: list[np.ndarray]
    right: int


def choose(
    model: VisionLanguageModel,
    examples: Examples,
    accelerator: Accelerator,
    builder: PromptBuilder,
    questions: Sequence[Question],
    offered: Sequence[tuple[list[str], int] | None],
    *,
    micro_tokens: int,
) -> np.ndarray:
    """float32 [N]: 1 where the right option is the likeliest of those `offered`, 0 where another is, not-a-number for others.

    The likelihood of an option is that of all its tokens and of the end of the turn, given the question and its pictures.
    """
    chosen = np.full(len(questions), np.nan, np.float32)
    choices = list(_choices(builder, questions, offered))
    if not choices:
        return chosen
    with tempfile.TemporaryDirectory(prefix="glance-") as folder:
        path = Path(folder) / "choices.arrow"
        write_tokens(path, _candidates(choices, questions, examples), examples.table.spec)
        table = TokenTable(path)
        slots = [np.array(questions[choice.number].slots, np.int64) for choice in choices for _ in choice.answers]
        asked = replace(
            examples,
            table=table,
            source=_Renumbered(examples.source, np.concatenate(slots)),
            shared=find_sharing(table) if examples.shared is not None else None,
        )
        _, likelihoods = log_likelihoods(model, asked, accelerator, micro_tokens=micro_tokens)
        ends = np.cumsum(table.supervised)
        sums = np.add.reduceat(likelihoods, np.concatenate([[0], ends[:-1]]), dtype=np.float64)
    first = 0
    for choice in choices:
        mine = sums[first : first + len(choice.answers)]
        chosen[choice.number] = float(np.argmax(mine) == choice.right)
        first += len(choice.answers)
    return chosen


def _choices(
    builder: PromptBuilder, questions: Sequence[Question], offered: Sequence[tuple[list[str], int] | None]
) -> Iterator[Choice]:
    """Those whose reference, encoded anew, is what was tokenised: then the others are spelt as the model would spell them."""
    for number, (question, found) in enumerate(zip(questions, offered, strict=True)):
        if found is None:
            continue
        answers, right = found
        encoded = builder.encode(answers)
        parts = [encoded.ids[start:end] for start, end in zip(encoded.bounds[:-1], encoded.bounds[1:], strict=True)]
        content = len(parts[right])
        if np.array_equal(parts[right], question.reference[:content]):
            yield Choice(number, [np.concatenate([part, question.reference[content:]]) for part in parts], right)


def _candidates(choices: Sequence[Choice], questions: Sequence[Question], examples: Examples) -> Iterator[pa.RecordBatch]:
    """Rows of a token table: each question with each of its answers."""
    hashes, names = examples.table.image_hashes(), examples.table.image_names()
    for start in range(0, len(choices), BATCH):
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for choice in choices[start : start + BATCH]:
            question = questions[choice.number]
            shown = question.slots
            for answer in choice.answers:
                columns["ids"].append(np.concatenate([question.prompt, answer]))
                columns["spans"].append([len(question.prompt), len(question.prompt) + len(answer)])
                columns["image_start"].append(question.image_start)
                columns["image_sha256"].append([hashes[slot].tobytes() for slot in shown])
                columns["image_name"].append(names.slice(shown.start, len(shown)).to_pylist())
                columns["where"].append(examples.table.where(question.row))
        yield pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


class _Renumbered:
    """Another table's feature source: image slot n here is `slots[n]` there."""

    def __init__(self, source: FeatureSource, slots: np.ndarray) -> None:
        self.tokens, self.width, self._source, self._slots = source.tokens, source.width, source, slots

    def announce(self, slots: np.ndarray) -> None:
        self._source.announce(self._slots[slots])

    def load(self, slots: np.ndarray) -> Any:
        return self._source.load(self._slots[slots])

    def features(self, loaded: Any) -> torch.Tensor:
        return self._source.features(loaded)

    def stream(self, items: Any) -> Any:
        return self._source.stream(items)
