"""Talks about several pictures, made of easy-VQA's questions about each: what a second picture asks of a model.

`build_dataset.py` writes training rows with it, and `measure_talks.py` asks a trained model about held-out ones. A talk is shaped
as chat and the web page shape one: a picture stands before the first question about it, and a later question says which picture
it means, or means the one shown last.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ORDINALS = ("first", "second", "third")
LEADS = (  # how a person names a picture that was shown before; {which} is the picture, {question} what is asked of it
    "in the {which} image, {question}",
    "in the {which} picture, {question}",
    "and in the {which} picture, {question}",
    "about the {which} image: {question}",
    "about the {which} picture again: {question}",
    "back to the {which} picture: {question}",
)
NAMED_BEHIND, CAPITAL = 0.5, 0.3  # shares of the questions that name the picture at their end, and that begin as a sentence
THREE, TOGETHER, STAY = 0.05, 0.05, 0.5  # shares: talks about three; those shown in one question; one more about the last
NAMED = 3  # questions at the end that say which picture they mean
APART = 0.7  # share of the questions that have another answer for another picture of the talk: those that teach which is meant

Lessons = Mapping[str, str]  # what may be asked of a picture, with the answers


class Step(NamedTuple):
    """Of a talk's plan: numbers of the pictures shown, the one asked about, and whether the question says which."""

    shown: tuple[int, ...]
    about: int
    named: bool


class Turn(NamedTuple):
    """A question of a talk, the pictures shown before it, and its answer."""

    shown: tuple[int, ...]
    question: str
    answer: str


def plan_talk(draw: random.Random) -> list[Step]:
    """A training talk: pictures one by one or together, each asked about, then questions that say which they mean."""
    pictures = 3 if draw.random() < THREE else 2
    steps: list[Step] = []
    if draw.random() < TOGETHER:
        steps.append(Step(tuple(range(pictures)), draw.randrange(pictures), named=True))
    else:
        for number in range(pictures):
            steps.append(Step((number,), number, named=False))
            if draw.random() < STAY:
                steps.append(Step((), number, named=False))
    back = [0, *(draw.randrange(pictures) for _ in range(NAMED - 1))]
    draw.shuffle(back)
    return steps + [Step((), number, named=True) for number in back]


def count_pictures(steps: Sequence[Step]) -> int:
    """How many pictures a talk shows."""
    return sum(len(step.shown) for step in steps)


def write_talk(lessons: Sequence[Lessons], steps: Sequence[Step], draw: random.Random, *, apart: float = APART) -> list[Turn]:
    """The talk of a plan, about pictures of which `lessons` are known."""
    turns = []
    for shown, about, named in steps:
        question = _pick(lessons, about, draw, apart)
        text = name_picture(question, about, draw) if named else question
        if draw.random() < CAPITAL:
            text = text[0].upper() + text[1:]
        turns.append(Turn(shown, text, lessons[about][question]))
    return turns


def name_picture(question: str, number: int, draw: random.Random) -> str:
    """The question said of picture `number` (from 0), in one of the ways that people say so."""
    which = ORDINALS[number]
    if draw.random() < NAMED_BEHIND:
        stem, picture = question.removesuffix("?").removesuffix(" in the image"), draw.choice(("image", "picture"))
        if "the image" in stem:
            return stem.replace("the image", f"the {which} {picture}") + "?"
        return f"{stem} in the {which} {picture}?"
    return draw.choice(LEADS).format(which=which, question=question)


def _pick(lessons: Sequence[Lessons], about: int, draw: random.Random, apart: float) -> str:
    """A question about one of the pictures; every second one, where there is a choice, is not answered by yes or no."""
    asked = sorted(lessons[about])
    others = [known for number, known in enumerate(lessons) if number != about]
    telling = [one for one in asked if any(known.get(one, lessons[about][one]) != lessons[about][one] for known in others)]
    chosen = telling if telling and draw.random() < apart else asked
    open_ones = [one for one in chosen if one.startswith("what")]
    return draw.choice(open_ones if open_ones and draw.random() < 0.5 else chosen)
