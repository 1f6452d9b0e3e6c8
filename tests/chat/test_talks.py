"""The embedded conversations about several pictures: what they answer is so, and chat puts its questions as they do.

The embedded language model has read such conversations about pictures that it was told of; they are put so too.
"""

import importlib
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.chat.assistant import Assistant, Conversation, user_turn
from pipeline.records.formats import RowPolicy, SourceSpec, open_source
from pipeline.records.record import ImageSlot, Record, Turn
from pipeline.text import PromptBuilder

DATA = Path(__file__).parents[2] / "data"
ORDINALS = ("first", "second", "third")


class Asked(NamedTuple):
    picture: str
    question: str
    answer: str


@cache
def records() -> list[Record]:
    return list(RowPolicy("stop", 0).keep(open_source(SourceSpec(str(DATA / "easyvqa/conversations.parquet"))).records()))


def scenes(file: str) -> dict[str, tuple[str, str]]:
    """Picture -> colour and shape, from the captions."""
    rows = map(json.loads, (DATA / "easyvqa" / file).read_text(encoding="utf-8").splitlines())
    return {row["images"][0]: tuple(row["messages"][1]["content"].rstrip(".").split()[1:]) for row in rows}


def exchanges(record: Record) -> list[Asked]:
    """What is asked, of which picture: the one that is named, or the last shown."""
    found, shown = list[Asked](), 0
    for user, assistant in zip(record.turns[::2], record.turns[1::2], strict=True):
        shown += sum(isinstance(part, ImageSlot) for part in user.parts)
        question, answer = ("".join(part for part in turn.parts if isinstance(part, str)).strip() for turn in (user, assistant))
        named = re.search("|".join(ORDINALS), question.lower())
        number = ORDINALS.index(named.group()) if named else shown - 1
        assert number < shown, "a picture that is named has been shown"
        found.append(Asked(record.images[number], question, answer))
    return found


def truth(question: str, scene: tuple[str, str], known: set[str]) -> str:
    """The answer by the picture's colour and shape."""
    words = set(re.findall(r"\w+", question.lower()))
    colour, shape = scene
    if "what" in words:
        return f"{colour.capitalize()}." if "color" in words else f"A {shape}."
    return "Yes." if bool(words & known & set(scene)) != bool(words & {"no", "not"}) else "No."


def test_every_answer_is_true_of_the_picture_that_is_meant() -> None:
    trained = scenes("captions.jsonl")
    known = {word for scene in trained.values() for word in scene}
    wrong = [
        one for record in records() for one in exchanges(record) if one.answer != truth(one.question, trained[one.picture], known)
    ]
    assert wrong == []


def test_many_questions_are_answered_otherwise_for_another_picture_of_the_talk() -> None:
    trained = scenes("captions.jsonl")
    known = {word for scene in trained.values() for word in scene}
    asked = [(record, one) for record in records() if len(record.images) > 1 for one in exchanges(record)]
    others = [
        any(truth(one.question, trained[name], known) != one.answer for name in record.images if name != one.picture)
        for record, one in asked
    ]
    assert np.mean(others) > 0.6


@pytest.mark.parametrize("pictures", [1, 2, 3])
def test_chat_puts_a_talk_as_it_is_trained(pictures: int) -> None:
    builder = PromptBuilder(str(DATA / "models/llm"), image_token="<image>", tokens=4)
    chosen = [record for record in records() if len(record.images) == pictures][:40]
    for record in chosen:
        talk, trained = Conversation(), builder.build(record.turns)
        for number, turn in enumerate(record.turns):
            if turn.role == "assistant":
                talk.turns.append(Turn("assistant", turn.parts))
                continue
            shown = [part for part in turn.parts if isinstance(part, ImageSlot)]
            text = "".join(part for part in turn.parts if isinstance(part, str)).lstrip("\n")
            Assistant.ask(object.__new__(Assistant), talk, text, [None for _ in shown])
            asked, end = builder.build_question(talk.turns), trained.spans[number // 2][0]
            assert asked.ids.tolist() == trained.ids[:end].tolist()
            assert asked.image_starts == tuple(start for start in trained.image_starts if start < end)


def test_the_language_model_has_read_talks_as_chat_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DATA)
    for name in ("talks", "schooling"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    schooling = importlib.import_module("schooling")
    monkeypatch.setattr(schooling, "TALK_BLURRED", 1.0)
    builder = PromptBuilder(str(DATA / "models/llm"), image_token="<image>", tokens=1)
    image = schooling.SPECIAL.index("<image>")
    writer = schooling.Writer(builder.tokenizer, schooling.read_lessons(), 1.0)
    seen = set[int]()
    for _ in range(60):
        row = writer.write_row()
        blurred = [weights != (1.0, 0.0, 0.0) for weights in row.weights]
        kept = [at for at, now in enumerate(blurred) if not (now and blurred[at - 1])]  # one place for each picture
        del kept[-1]  # the newline behind the last answer, which the pipeline leaves out
        ids = [image if blurred[at] else row.ids[at][0] for at in kept]
        turns, shown = list[Turn](), 0
        for role, words in re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", builder.tokenizer.decode(ids), re.DOTALL):
            here = words.count("<image>")
            text = words.replace("<image>\n", "")
            turns.append(user_turn(text, range(shown, shown + here)) if role == "user" else Turn(role, (text,)))
            shown += here
        asked = builder.build(turns)
        assert ids == asked.ids.tolist()
        learnt = {place for start, end in asked.spans for place in range(start, end)}
        assert [row.supervised[at] for at in kept] == [place in learnt for place in range(len(kept))]
        seen.add(shown)
    assert seen == {2, 3}
