"""What the embedded world's language model reads: dialogues about pictures that it is told of and never sees.

A dialogue tells what a picture shows, in words or as a blur of words, somewhere in a stretch of others, and then asks. A talk is
one about two or three pictures, shaped as `talks.py` shapes those that the model is shown later. `build_llm.py` trains on them.
"""

import json
import math
import random
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from talks import count_pictures, plan_talk, write_talk
from transformers import PreTrainedTokenizerFast

SOURCE = Path(__file__).parent / "easyvqa"
SEED = 0
PAD, START, END, IMAGE = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
DESCRIBE = "Describe the image."
BLURRED, WORDED = 0.6, 0.97  # up to the first share of the dialogues blurred, up to the second told in words, the rest told nothing
TALK_BLURRED = 0.75  # share of a talk's pictures that are blurred; the others are told in words
DESCRIPTIONS = (
    "a {c} {s}",
    "{c} {s}",
    "The picture shows a {c} {s}.",
    "There is a {c} {s} in it.",
    "One can see a {s}. It is {c}.",
    "In the image there is a {s}, and the {s} is {c}.",
    "Its color is {c} and its shape is a {s}.",
    "shape: {s}, color: {c}",
    "I drew one {s} with a {c} pen.",
    "The only thing there is {c}, a {s}.",
)
FILLERS = (
    "The background is light.",
    "It was made by a computer.",
    "The picture is small.",
    "Nothing else can be seen.",
    "I found it on my desk this morning.",
    "It is not in the middle.",
    "A friend sent it to me.",
    "Look at it for a while.",
    "There is a lot of empty space around it.",
    "The lines are sharp.",
    "and so on,",
    "well,",
)
SMALL_TALK = (
    ("Hello.", "Hello! Show me a picture and ask about it."),
    ("Who are you?", "A small language model that knows shapes and colors."),
    ("What can you do?", "I can tell the color and the shape of what a picture shows."),
    ("Thank you.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
)
PLAIN = (
    "A triangle has three sides. A rectangle has four sides. A circle has none.",
    "Some {s}s are {c}, and some are not. Every {c} {s} is a {s}.",
    "If a shape is {c}, then it has a color. If a shape is a {s}, then it is not of another shape.",
    "Black, blue, brown, gray, green, red, teal and yellow are colors.",
    "Yesterday I saw a {c} {s}. Today the {c} {s} is still there.",
    "Question: what is a {s}? It is a shape. Question: what is {c}? It is a color.",
)

Scene = tuple[str, str]  # colour, shape
Lessons = dict[Scene, list[tuple[str, str]]]  # what may be asked of a scene, with the answers


class Row(NamedTuple):
    """One training text of T tokens.

    A token's embedding is a weighted sum of three, plus noise; plain text is weights (1, 0, 0).
    """

    ids: list[tuple[int, int, int]]
    weights: list[tuple[float, float, float]]
    noise: list[float]
    supervised: list[bool]


def read_lessons() -> Lessons:
    """The training questions, each tied to the caption of the picture it was asked about."""
    scene_of: dict[str, Scene] = {}
    lessons: dict[Scene, dict[str, str]] = defaultdict(dict)
    for name in ("captions", "questions"):
        for line in (SOURCE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            request, reply = (message["content"] for message in record["messages"])
            picture = record["images"][0]
            if name == "captions":
                _, colour, shape = reply.rstrip(".").split()
                scene_of[picture] = (colour, shape)
            lessons[scene_of[picture]][request.removeprefix(f"{IMAGE}\n")] = reply
    return {scene: sorted(lessons[scene].items()) for scene in sorted(lessons)}


def describe(scene: Scene, words: random.Random, level: float) -> str:
    """A scene in words, one to three times, among sentences that say nothing of it."""
    parts = [words.choice(DESCRIPTIONS).format(c=scene[0], s=scene[1]) for _ in range(words.choice((1, 1, 1, 2, 3)))]
    for _ in range(round(level * words.choice((0, 0, 1, 2, 3, 4, 6)))):
        parts.insert(words.randint(0, len(parts)), words.choice(FILLERS))
    return " ".join(parts)


class Writer:
    """Writes training texts as rows of token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, lessons: Lessons, talks: float) -> None:
        self.lessons, self.words = lessons, random.Random(SEED)
        self.talks = talks  # share of the rows that are talks about several pictures
        self.asked = {scene: {one: answer for one, answer in known if one != DESCRIBE} for scene, known in lessons.items()}
        self.encode = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        telling = {self.encode(f" {word}")[0] for scene in lessons for word in scene}
        self.level = 0.0  # how hard the texts are, 0 to 1
        self.ordinary = [i for i in range(len(SPECIAL), len(tokenizer)) if i not in telling]

    def add(self, row: Row, text: str, *, supervised: bool = False) -> None:
        """Append plain text to a row."""
        for token in self.encode(text):
            row.ids.append((token, 0, 0))
            row.weights.append((1.0, 0.0, 0.0))
            row.noise.append(0.0)
            row.supervised.append(supervised)

    def smear(self, row: Row, scene: Scene) -> None:
        """Append a scene as a stretch of words laid over each other, blurred, in no order.

        Text that lost its spelling: the model must find a meaning wherever it is, however
        faint or mixed with others, as it will have to in what a projector hands it.
        """
        words = self.words
        colour, shape = (self.encode(f" {word}")[0] for word in scene)
        longest = 8 + round(64 * self.level)
        length = words.choice((max(2, longest - 8), words.randint(2, longest)))
        density, faintest = words.choice((0.1, 0.4, 1.0, 1.0)), 1.0 - 0.8 * self.level
        loudness = math.exp(self.level * words.uniform(-0.7, 3.0))  # projectors are rarely in scale
        noise = loudness * self.level * words.choice((0.0, words.uniform(0.0, 1.0)))
        common = words.choice(self.ordinary)
        carriers = set(words.sample(range(length), max(2, round(length * density))))
        first, last = min(carriers), max(carriers)
        together = words.random() < 0.6
        for place in range(length):
            other = common if words.random() < 0.5 else words.choice(self.ordinary)
            c, s = words.uniform(faintest, 2.0), words.uniform(faintest, 2.0)
            if place not in carriers:
                c = s = 0.0
            elif not together:  # one word a place, each at least once
                colours = place == first or (place != last and words.random() < 0.5)
                c, s = (c, 0.0) if colours else (0.0, s)
            row.ids.append((colour, shape, other))
            other_weight = words.uniform(0.0, 1.0)
            row.weights.append((loudness * c, loudness * s, loudness * other_weight))
            row.noise.append(noise)
            row.supervised.append(False)

    def write_dialogue(self) -> Row:
        """A description of one kind or another, then one to five questions about it."""
        row, words = Row([], [], [], []), self.words
        scene = words.choice([*self.lessons])
        lessons = words.choices(self.lessons[scene], k=words.choice((1, 2, 3, 4, 5)))
        if words.random() < 0.5 - 0.4 * self.level:
            lessons[0] = (DESCRIBE, f"A {scene[0]} {scene[1]}.")
        self.add(row, f"{START}user\n")
        kind = words.random()
        if kind < BLURRED:
            self.smear(row, scene)
        elif kind < WORDED:
            self.add(row, describe(scene, words, self.level))
        for turn, (question, answer) in enumerate(lessons):
            if words.random() < 0.2:
                question = question[0].upper() + question[1:]
            lead = "\n" if turn == 0 else f"{START}user\n"
            self.add(row, f"{lead}{question}{END}\n{START}assistant\n")
            self.add(row, f"{answer}{END}", supervised=True)
            self.add(row, "\n")
        return row

    def write_talk(self) -> Row:
        """Two or three pictures, told of one by one or together, and questions about each, also about one told of before."""
        row, words = Row([], [], [], []), self.words
        steps = plan_talk(words)
        scenes = words.sample([*self.lessons], count_pictures(steps))
        for turn in write_talk([self.asked[scene] for scene in scenes], steps, words):
            self.add(row, f"{START}user\n")
            for place, number in enumerate(turn.shown):
                if place:
                    self.add(row, "\n")
                if words.random() < TALK_BLURRED:
                    self.smear(row, scenes[number])
                else:
                    self.add(row, describe(scenes[number], words, self.level))
            lead = "\n" if turn.shown else ""
            self.add(row, f"{lead}{turn.question}{END}\n{START}assistant\n")
            self.add(row, f"{turn.answer}{END}", supervised=True)
            self.add(row, "\n")
        return row

    def write_row(self) -> Row:
        """A talk, or a dialogue about a picture, or now and then small talk or plain text."""
        if self.talks and self.words.random() < self.talks:
            return self.write_talk()
        row, kind = Row([], [], [], []), self.words.random()
        if kind < 0.02:
            question, answer = self.words.choice(SMALL_TALK)
            self.add(row, f"{START}user\n{question}{END}\n{START}assistant\n")
            self.add(row, f"{answer}{END}", supervised=True)
        elif kind < 0.05:
            colour, shape = self.words.choice([*self.lessons])
            text = self.words.choice(PLAIN).format(c=colour, s=shape)
            self.add(row, f"{text}{PAD}", supervised=True)
        else:
            row = self.write_dialogue()
        return row
