"""Rows of random layouts with random known and unknown keys, from the file to the token table: nothing is left unread.

What a row may say is drawn beside it: words that must reach the tokens, words that say nothing, and words that nobody reads,
for which the row must be refused by name. The slow test takes 30,000 rows.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World, len_of

from pipeline.records.formats import BadRow, SourceSpec, open_source
from pipeline.text.token_table import TokenTable, write_tokens
from pipeline.text.tokenization import RowTokenizer, Summary, tokenize

HARMLESS = [
    "id",
    "question_id",
    "source",
    "score",
    "split",
    "url",
    "width",
    "sha256",
    "license",
    "aesthetic_score",
    "metadata",
    "model",
]
UNKNOWN = [
    "persona",
    "context",
    "tools",
    "rejected",
    "reasoning_content",
    "emotion",
    "functions",
    "hint",
    "sytem",
    "weights",
    "x" * 90,
]
WORDS = ["cat", "dog", "red", "blue", "circle", "square", "yes", "no", "what", "is"]


@dataclass
class Drawn:
    """A row, what must be heard of it and be supervised, and for which key it must be refused, if any."""

    content: dict[str, Any]
    heard: list[str] = field(default_factory=list)
    supervised: list[str] = field(default_factory=list)
    refused_for: list[str] = field(default_factory=list)


class Dice:
    """Draws rows; every text is of its own words, so that a lost one shows."""

    def __init__(self, seed: int) -> None:
        self.chance, self.number = random.Random(seed), 0

    def words(self) -> str:
        self.number += 1
        edges = self.chance.choice([("", "")] * 8 + [(" ", ""), ("", "\n"), ("", " ")])  # such a text is encoded with its template
        return f"{self.chance.choice(WORDS)} {self.number}z".join(edges)

    def row(self) -> Drawn:
        layout = self.chance.choice([self.turns, self.spoken, self.pairs, self.asked, self.caption])
        row = layout()
        if self.chance.random() < 0.3 and "system" not in row.content:
            row.content[self.chance.choice(["system", "system_prompt"])] = said = self.words()
            row.heard.append(said)
        for _ in range(self.chance.randrange(3)):
            row.content[self.chance.choice(HARMLESS)] = self.chance.choice([3, 0.5, "web", ["a"], {"b": 1}, True, None])
        if self.chance.random() < 0.2:
            key = self.chance.choice(UNKNOWN)
            row.content[key] = value = self.chance.choice([self.words(), [self.words()], {"a": 1}, 0.25, None, "", []])
            row.refused_for += [key] * (value not in (None, "", []))
        items = list(row.content.items())
        self.chance.shuffle(items)
        row.content = dict(items)
        return row

    def picture(self, row: Drawn, placed: bool) -> str:
        """A place for a picture, and the picture, in some rows."""
        if self.chance.random() < 0.5:
            return ""
        key = self.chance.choice(["image", "images"])
        name = f"{self.chance.randrange(6)}.png"
        row.content[key] = [name] if key == "images" else name
        return "<image>\n" if placed else ""

    def answer(self, row: Drawn, turn: dict[str, Any], said: str) -> dict[str, Any]:
        """A turn of the assistant, now and then with a mask, or with what nobody reads."""
        row.heard.append(said)
        masked = False
        if self.chance.random() < 0.3:
            key, value = self.chance.choice([("loss", False), ("train", False), ("weight", 0), ("masked", True), ("loss", True),
                                             ("weight", 1.0), ("masked", False), ("loss", None)])  # fmt: skip
            turn[key] = value
            masked = value is not None and bool(value) == (key == "masked")
        if self.chance.random() < 0.05:
            turn["weight"] = 0.5
            row.refused_for.append("weight")
        if self.chance.random() < 0.05:
            key = self.chance.choice(["tool_calls", "name", "thought"])
            turn[key] = self.words()
            row.refused_for.append(key)
        if not masked:
            row.supervised.append(said)
        return turn

    def turns(self) -> Drawn:
        return self.talk("messages", ("role", "content"), ("user", "assistant"))

    def spoken(self) -> Drawn:
        return self.talk("conversations", ("from", "value"), ("human", "gpt"))

    def talk(self, key: str, spelling: tuple[str, str], roles: tuple[str, str]) -> Drawn:
        row, turns, place = Drawn({}), list[dict[str, Any]](), ""
        place = self.picture(row, placed=True)
        for _ in range(self.chance.randrange(1, 4)):
            asked, said = self.words(), self.words()
            row.heard.append(asked)
            turns.append(dict(zip(spelling, (roles[0], place + asked), strict=True)))
            turns.append(self.answer(row, dict(zip(spelling, (roles[1], said), strict=True)), said))
            place = ""
        row.content[key] = turns if self.chance.random() < 0.8 else json.dumps(turns)
        return row

    def pairs(self) -> Drawn:
        row = Drawn({})
        self.picture(row, placed=False)
        row.content["texts"] = []
        for _ in range(self.chance.randrange(1, 3)):
            asked, said = self.words(), self.words()
            row.heard.append(asked)
            row.content["texts"].append(self.answer(row, {"user": asked, "assistant": said}, said))
        return row

    def asked(self) -> Drawn:
        asked, said = self.words(), self.words()
        names = [
            ("question", "answer"),
            ("query", "label"),
            ("instruction", "output"),
            ("prompt", "completion"),
            ("query", "response"),
        ]
        question, answer = self.chance.choice(names)
        row = Drawn({question: asked, answer: [said] if answer == "label" else said}, [asked, said], [said])
        self.picture(row, placed=False)
        return row

    def caption(self) -> Drawn:
        said = self.words()
        row = Drawn({"image": f"{self.chance.randrange(6)}.png", self.chance.choice(["text", "caption"]): said}, [said], [said])
        if self.chance.random() < 0.1:
            row.content["answer"] = self.words()
            row.refused_for.append("answer")
        return row


def require_nothing_unread(world: World, folder: Path, count: int, seed: int) -> None:
    dice = Dice(seed)
    drawn = [dice.row() for _ in range(count)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row.content) + "\n" for row in drawn))
    source, bad, total = open_source(SourceSpec(str(path), str(world.images.path))), dict[int, BadRow](), Summary()
    batches = tokenize(
        source.records(), RowTokenizer(world.builder, source.images, 4096, "stop"), total, workers=2, progress=len_of,
        reject=lambda row: bad.setdefault(int(row.row), row),  # type: ignore[arg-type]
    )  # fmt: skip
    write_tokens(folder / "rows.arrow", batches, world.builder.spec())
    table = TokenTable(folder / "rows.arrow")
    assert total.rows_in == count == len(table) + len(bad)
    places = {int(table.where(number).rpartition(":")[2]): number for number in range(len(table))}
    assert not places.keys() & bad.keys()
    for line, row in enumerate(drawn, start=1):
        if row.refused_for or not row.supervised:
            reason = bad[line].line()
            assert len(reason.splitlines()) == 1
            if row.refused_for:
                assert any(key[:80] in reason for key in row.refused_for), (row.content, reason)
            continue
        assert line in places, (row.content, bad[line].line())
        found = table.row(places[line])
        text = world.builder.tokenizer.decode(found.ids.tolist())
        learnt = world.builder.tokenizer.decode(np.concatenate([found.ids[start:end] for start, end in found.spans]).tolist())
        assert all(said.strip() in text for said in row.heard), (row.content, text)
        assert all((said.strip() in learnt) == (said in row.supervised) for said in row.heard), (row.content, learnt)
    assert 0.5 * count < len(table) < 0.9 * count, "some of each, or the dice are loaded"


def test_three_hundred_rows_of_random_keys(world: World, tmp_path: Path) -> None:
    require_nothing_unread(world, tmp_path, 300, seed=1)


@pytest.mark.slow
def test_thirty_thousand_rows_of_random_keys(world: World, tmp_path: Path) -> None:
    require_nothing_unread(world, tmp_path, 30_000, seed=2)
