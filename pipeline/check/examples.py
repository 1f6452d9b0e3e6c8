"""A few rows, drawn evenly from all, kept as the model will see them: text by kind of token, pictures as thumbnails."""

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.check.pictures import SHOWN
from pipeline.records import ImageSlot, Record
from pipeline.text import Prompt, PromptBuilder

LONGEST = 4000  # letters shown of one row


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one kind: text, control, image or role."""

    kind: str
    text: str
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    where: str
    note: str
    thumbnails: tuple[str, ...]
    pieces: tuple[Piece, ...]


class Examples:
    """A seeded, even draw of at most `count` rows of a stream of unknown length (reservoir sampling)."""

    def __init__(self, count: int) -> None:
        self._chance, self._count, self._seen = random.Random(0), count, 0
        self._kept: dict[int, Example] = {}

    def draw(self, rows: int) -> dict[int, int]:
        """Which of the next `rows` rows are kept, by position, each with its place among the examples."""
        taken: dict[int, int] = {}
        for position in range(rows):
            self._seen += 1
            place = self._seen - 1 if self._seen <= self._count else self._chance.randrange(self._seen)
            if place < self._count:
                taken[place] = position  # a later row of the same chunk takes the place of an earlier one
        return {position: place for place, position in taken.items()}

    def keep(self, place: int, example: Example) -> None:
        self._kept[place] = example

    def all(self) -> list[Example]:
        return [self._kept[place] for place in sorted(self._kept)]


def make_example(record: Record, prompt: Prompt | None, builder: PromptBuilder | None, thumbnails: dict[str, str]) -> Example:
    """A row drawn: its tokens where there is a tokenizer, else its turns."""
    drawn = tuple(thumbnails[name] for name in record.images[:SHOWN] if name in thumbnails)
    notes = [f"{len(prompt.ids):,} tokens"] if prompt is not None else []
    if len(record.images) > len(drawn):
        notes.append(f"{len(record.images) - len(drawn)} more pictures")
    pieces = _tokens(prompt, builder) if prompt is not None and builder is not None else _turns(record)
    shown, letters = [], 0
    for piece in pieces:
        letters += len(piece.text)
        shown.append(Piece(piece.kind, piece.text[: max(0, LONGEST - letters + len(piece.text))], piece.supervised))
        if letters > LONGEST:
            notes.append(f"the first {LONGEST:,} letters")
            break
    return Example(record.where, ", ".join(notes), drawn, tuple(shown))


def _tokens(prompt: Prompt, builder: PromptBuilder) -> list[Piece]:
    """Runs of tokens of one kind; a picture's run as its length."""
    kinds = np.isin(prompt.ids, np.array(sorted(builder.control.values()))).astype(np.uint8)
    for number, start in enumerate(sorted(prompt.image_starts)):
        kinds[start : start + builder.tokens] = 2 + number % 2  # neighbours differ, so that two pictures stay two
    for start, end in prompt.spans:
        kinds[start:end] += 4
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    pieces = []
    for start, end in pairwise(edges):
        kind, supervised = int(kinds[start]) % 4, bool(kinds[start] >= 4)
        if kind >= 2:
            pieces.append(Piece("image", f"[{end - start} image tokens]", supervised))
            continue
        text = str(
            builder.tokenizer.decode(prompt.ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        pieces.append(Piece("control" if kind else "text", text, supervised))
    return pieces


def _turns(record: Record) -> list[Piece]:
    """Without a tokenizer: the turns, and where pictures stand."""
    pieces = []
    for turn in record.turns:
        pieces.append(Piece("role", turn.role))
        for part in turn.parts:
            if isinstance(part, ImageSlot):
                pieces.append(Piece("image", f"[picture {part.index + 1}]"))
            else:
                pieces.append(Piece("text", part, turn.role == "assistant"))
    return pieces
