"""Synthetic rows for benchmarks of reading and tokenising: captions and conversations, as many as asked for, from a seed.

Half the rows are captions of 30 to 45 words about one picture under one of a few instructions, as pretraining has them; the
others are conversations of one to four questions with one picture, two or none, some behind a system turn. No two answers,
and no two questions of conversations, are likely to be the same. Rows are made one at a time.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

GROUP = 4096  # rows of a Parquet row group

WORDS = """
a the of and in on with at by near under over behind beside from into small large young old red blue green yellow white
black brown grey bright dark wooden metal plastic empty busy quiet wet dry tall round wide narrow striped colourful man
woman child boy girl dog cat horse bird cow sheep car bus train truck bicycle boat plane street road field beach
mountain river forest garden kitchen room table chair bench window door wall floor sky cloud sun snow rain grass tree
flower leaf stone water cup plate bowl bottle glass knife fork spoon bread cake apple orange banana pizza sandwich hat
coat shirt dress shoe bag umbrella phone book camera clock lamp bed sofa mirror picture sign light bridge tower building
house roof fence gate is are was were has holding wearing sitting standing walking running riding looking eating
drinking playing carrying crossing waiting reading smiling sleeping parked covered surrounded filled painted two three
several many some one another its his her their this that there while as it they who which very next left right front
side top bottom middle corner background
""".split()  # noqa: SIM905
SYLLABLES = "ka lo mi ren tor ves an bel du fi gor hal ine ster ton wick berg dale ford mar sen vil".split()  # noqa: SIM905
RARE = 12  # one word in so many is made up of these, since captions are full of names
ASKED = ("Describe this picture in one sentence.", "What is shown here?", "Give a short caption.", "Summarise what you see.")
SYSTEM = "You answer questions about pictures, briefly and truthfully."


def rows(count: int, pictures: list[str], *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` rows `{"images": [...], "messages": [...]}` over the named pictures; the same for the same seed."""
    draw = random.Random(seed)
    for _ in range(count):
        yield _caption(draw, pictures) if draw.random() < 0.5 else _conversation(draw, pictures)


def _caption(draw: random.Random, pictures: list[str]) -> dict[str, Any]:
    asked = f"<image>\n{draw.choice(ASKED)}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": _sentence(draw, 30, 45, ".")}]
    return {"images": [draw.choice(pictures)], "messages": messages}


def _conversation(draw: random.Random, pictures: list[str]) -> dict[str, Any]:
    shown = draw.choice((0, 1, 1, 2))
    messages = [{"role": "system", "content": SYSTEM}] if draw.random() < 0.2 else []
    for turn in range(draw.randint(1, 4)):
        question = "<image>\n" * (shown if turn == 0 else 0) + _sentence(draw, 6, 14, "?")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _sentence(draw, 3, 25, ".")})
    return {"images": [draw.choice(pictures) for _ in range(shown)], "messages": messages}


def _sentence(draw: random.Random, fewest: int, most: int, end: str) -> str:
    words = draw.choices(WORDS, k=draw.randint(fewest, most))
    for _ in range(len(words) // RARE):  # names of people, places and makes
        words[draw.randrange(len(words))] = "".join(draw.choices(SYLLABLES, k=draw.randint(2, 4)))
    return " ".join(words).capitalize() + end


def write_rows(folder: Path, count: int, *, pictures: int) -> list[str]:
    """`count` rows as rows.jsonl and rows.parquet, and the small PNG files that they name below `images`, by these names."""
    (folder / "images").mkdir(parents=True)
    names = [f"{number:06d}.png" for number in range(pictures)]
    for number, name in enumerate(names):
        Image.fromarray(np.full((16, 16, 3), (*divmod(number, 256), 0), np.uint8)).save(folder / "images" / name)
    made = rows(count, names)
    schema = pa.RecordBatch.from_pylist(list(rows(100, names))).schema
    with (folder / "rows.jsonl").open("w") as lines, pq.ParquetWriter(folder / "rows.parquet", schema) as table:
        while group := list(islice(made, GROUP)):
            lines.writelines(json.dumps(row) + "\n" for row in group)
            table.write_batch(pa.RecordBatch.from_pylist(group, schema=schema), row_group_size=GROUP)
    return names
