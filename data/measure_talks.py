"""How well a trained model talks about several pictures: `python data/measure_talks.py [MODEL]`, on pictures it never saw.

Reads data/easyvqa/questions_heldout.jsonl and images.zip, and models/sft; prints a line of JSON. Each talk shows a picture and
asks about it (`first_shown`), shows another and asks about that (`second_shown`), asks about the second again without naming it
(`second_again`) and then about the first by name (`back_to_first`). It goes on with the model's own answers, as a person's does.
Every question is one that easy-VQA asks of that picture; none is chosen for being answered otherwise for the other picture.
"""

import json
import random
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import torch
from talks import Step, write_talk

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.core import quiet_libraries

DATA = Path(__file__).parent / "easyvqa"
TALKS, SEED = 1000, 7
ASKED = {
    "first_shown": Step((0,), 0, named=False),
    "second_shown": Step((1,), 1, named=False),
    "second_again": Step((), 1, named=False),
    "back_to_first": Step((), 0, named=True),
}


def read_lessons(file: Path) -> dict[str, dict[str, str]]:
    """Picture -> its questions and answers."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            asked, answer = (message["content"] for message in row["messages"])
            found[row["images"][0]][asked.removeprefix("<image>\n")] = answer
    return found


def measure(assistant: Assistant, count: int = TALKS) -> dict[str, float]:
    """Shares of right answers over `count` talks, by what was asked."""
    lessons, draw = read_lessons(DATA / "questions_heldout.jsonl"), random.Random(SEED)
    right: dict[str, int] = dict.fromkeys(ASKED, 0)
    with zipfile.ZipFile(DATA / "images.zip") as archive:
        for _ in range(count):
            talk, pictures = Conversation(), draw.sample(sorted(lessons), 2)
            turns = write_talk([lessons[name] for name in pictures], list(ASKED.values()), draw, apart=0.0)
            for asked, turn in zip(ASKED, turns, strict=True):
                shown = [pictures[number] for number in turn.shown]
                assistant.ask(talk, turn.question, [assistant.look_at(archive.read(name), name) for name in shown])
                right[asked] += "".join(assistant.answer(talk, Sampling(8))).strip() == turn.answer
    return {name: round(hits / count, 4) for name, hits in right.items()} | {"talks": count}


if __name__ == "__main__":
    quiet_libraries()
    torch.set_num_threads(1)
    print(json.dumps(measure(Assistant(sys.argv[1] if len(sys.argv) > 1 else "models/sft", device="cpu"))))
