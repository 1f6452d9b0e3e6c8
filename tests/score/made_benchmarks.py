"""Rows as each benchmark's copy on the hub has them, answers to them as models give them, and copies of both on disk.

Everything follows from the task's name, so that lmms-eval, in an environment of its own, sees the same (lmms_eval_figures.py).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

Content = dict[str, Any]
COUNT, PICTURES = 200, 20
SAID = [
    "red circle", "A red circle.", "the red, circle", "2", "two", "Two.", "1,000", "1000", "1,000 people", "dont know",
    "don't know", "yes", "No", "left-handed", "left handed", "3.5", "3.5%", "u.s.", "it's red", "its red", "Red,blue",
    "red (dark)", "what?", "none", "0", "a", "an apple!", "cat/dog", "o'clock", "5\npm", "5 pm", "whats up", "youre right",
    "10.", "$4.50", '"stop"', "no smoking;",
]  # fmt: skip
WORDS = ["a cat", "the dog", "two birds", "Banana", "north", "photosynthesis", "a red car", "blue", "3", "none of these"]
CATEGORIES = {
    "mme": ["existence", "OCR", "color", "code_reasoning", "text_translation"],
    "mmstar": [
        "math/geometry",
        "math/statistical reasoning",
        "coarse perception/image emotion",
        "logical reasoning/common reasoning",
    ],
    "mmbench": ["attribute_recognition", "future_prediction"],
    "pope": ["adversarial", "popular", "random"],
}


def _letters(drawn: np.random.Generator, right: str, options: Sequence[str]) -> str:
    """A multiple choice answered in one of the ways in which models do."""
    letter = str(drawn.choice(list("ABCD"))) if drawn.random() < 0.5 else right
    words, other = options["ABCD".index(letter)] if letter in "ABCD"[: len(options)] else "nothing", drawn.choice(list("ABCD"))
    forms = [
        letter, letter.lower(), f"{letter}.", f"{letter}. {words}", f"({letter})", f"({letter}) {words}", f"{letter}) {words}",
        words, f"The answer is {letter}.", f"I think it is {words}, so {letter}: yes", f"{words}.", f"{letter} ", "Because", "",
        f"A cat. The correct option is {letter} not {other}", f"Not {other}, the best answer is {letter}", "nothing of it",
        f"{letter}: {words} or {other}", f"It is: {letter}", f"the choice is ({letter}), since A man is there",
        f"between {letter} and {other}", f"A {words} is there in it", f"[{letter}]", f"Option {letter},",
        f"I choose {letter} or maybe {other} in the end",
    ]  # fmt: skip
    return str(drawn.choice(forms))


def _rows(name: str, drawn: np.random.Generator, number: int) -> Content:
    """One row, `picture` in place of its image."""
    options = [str(words) for words in drawn.permutation(WORDS)[: int(drawn.integers(2, 5))]]
    letter, four = "ABCD"[int(drawn.integers(len(options)))], [*options, *["nothing"] * 4][:4]
    question = f"{drawn.choice(['what is', 'Is this', 'Which one, of all, is'])} number {number}?"
    picture = {"picture": number % PICTURES}
    if name in ("vqav2", "textvqa"):
        some = drawn.choice(SAID, 3)
        people = [str(drawn.choice(some)) for _ in range(10)]
        if name == "textvqa":
            return {"question_id": number, "question": question, "answers": people, **picture}
        answers = [{"answer": said, "answer_confidence": "yes", "answer_id": place + 1} for place, said in enumerate(people)]
        kind = str(drawn.choice(["yes/no", "number", "other"]))
        more = {"multiple_choice_answer": people[0], "answer_type": kind, "question_id": number}
        return {"question": question, "answers": answers, **more, **picture}
    if name == "gqa":
        return {
            "id": f"q{number}",
            "imageId": f"n{number % PICTURES}",
            "question": question,
            "answer": str(drawn.choice(WORDS)),
            **picture,
        }
    if name == "scienceqa":
        hint, subject = str(drawn.choice(["", "Look at the map."])), str(drawn.choice(["natural science", "language science"]))
        answer = {"answer": "ABCD".index(letter), "hint": hint, "subject": subject}
        return {"question": question, "choices": options, **answer, **picture}
    if name in ("pope", "mme"):
        answer = str(drawn.choice(["yes", "no"] if name == "pope" else ["Yes", "No"]))
        category = CATEGORIES[name][number // 2 % len(CATEGORIES[name])]
        asked = question if name == "pope" else f"{question} Please answer yes or no."
        return {"question_id": str(number // 2), "question": asked, "answer": answer, "category": category, **picture}
    if name == "mmstar":
        category, _, fine = CATEGORIES[name][int(drawn.integers(4))].partition("/")
        asked = question + "\nOptions: " + ", ".join(f"{each}: {words}" for each, words in zip("ABCD", four, strict=True))
        return {"index": number, "question": asked, "answer": letter, "category": category, "l2_category": fine, **picture}
    if name == "mmbench":  # a question stands there as often as it has options, these turned round
        columns = {each: options[place] if place < len(options) else None for place, each in enumerate("ABCD")}
        place = {"index": number // 2 + number % 2 * 1_000_000, "category": CATEGORIES[name][number // 2 % 2], "L2-category": "l2"}
        hint = str(drawn.choice(["nan", "It is noon."]))
        return {"question": question, "hint": hint, **columns, "answer": letter, "source": "s", "split": "dev", **place, **picture}
    if name == "ai2d":
        return {"question": question, "options": options, "answer": str("ABCD".index(letter)), **picture}
    if name == "chartqa":
        answer = str(drawn.choice(["12", "0.5", "45%", "0", "Blue", "1,200", "3.14", "-7"]))
        return {"type": str(drawn.choice(["human_test", "augmented_test"])), "question": question, "answer": answer, **picture}
    named = {f"choice_{each}": words for each, words in zip("abcd", four, strict=True)}
    return {"question": question, **named, "answer": letter, "data_type": "image", "question_id": str(number), **picture}


def rows_of(name: str, count: int = COUNT) -> list[Content]:
    """The rows of a task, always the same."""
    drawn = np.random.default_rng(crc32(name.encode()))
    return [_rows(name, drawn, number) for number in range(count)]


def answers_to(name: str, rows: Sequence[Content]) -> list[str]:
    """An answer to each row, some right, some nearly, some wrong; blanks at the ends gone, as generated ones are."""
    drawn = np.random.default_rng(crc32(f"answers to {name}".encode()))
    return [_answer(name, drawn, row).strip() for row in rows]


def _answer(name: str, drawn: np.random.Generator, row: Content) -> str:
    if name in ("vqav2", "textvqa"):
        people = [each["answer"] if isinstance(each, dict) else each for each in row["answers"]]
        return str(drawn.choice([*people, *drawn.choice(SAID, 4)]))
    if name in ("pope", "mme"):
        right = row["answer"] if drawn.random() < 0.6 else str(drawn.choice(["yes", "no"]))
        forms = [
            right,
            right,
            right.lower(),
            f"{right}.",
            right[0],
            f"{right}, it is",
            f" {right}",
            "maybe",
            "Not sure",
            "a yes",
            "",
        ]
        return str(drawn.choice(forms))
    if name == "gqa":
        return str(drawn.choice([row["answer"], row["answer"].upper() + ".", "a  cat", *WORDS]))
    if name == "chartqa":
        near = ["12.5", "12.7", "0.52", "44%", "0.45", "0", "0.0", "blue", "Blue.", "1200", "3", "-7.2", "nan", "inf", ""]
        return str(drawn.choice([row["answer"], *near]))
    options = (
        row.get("choices") or row.get("options") or [row.get(each) or row.get(f"choice_{each.lower()}") or "" for each in "ABCD"]
    )
    right = row["answer"] if row["answer"] in tuple("ABCD") else "ABCD"[int(row["answer"])]
    return _letters(drawn, right, options)


def write_copy(folder: Path, name: str, rows: Sequence[Content], png: Callable[[int], bytes], *, saved: bool = False) -> None:
    """A local copy as the hub has it (Parquet, several files and splits) or, with `saved`, as `datasets` saves it."""
    made = {number: {"bytes": png(number), "path": None} for number in {row["picture"] for row in rows}}
    shown = [{**{key: value for key, value in row.items() if key != "picture"}, "image": made[row["picture"]]} for row in rows]
    if name == "seed":
        shown = [{**row, "image": [row["image"]]} for row in shown]
    if name == "gqa":
        _write(folder / "testdev_balanced_images", "testdev", [{"id": f"n{n}", "image": image} for n, image in made.items()], saved)
        shown = [{key: value for key, value in row.items() if key != "image"} for row in shown]
        _write(folder / "testdev_balanced_instructions", "testdev", shown, saved)
        return
    config, split = PLACES[name]
    _write(folder / config, split, shown, saved)
    if not saved and name != "mmstar":
        _write(folder / config, "train", shown[:1], saved)  # which nobody asks for


PLACES = {  # folder and split of each task's files
    **dict.fromkeys(["vqav2", "textvqa"], ("data", "validation")),
    **dict.fromkeys(["pope", "mme", "ai2d", "chartqa", "seed"], ("data", "test")),
    "scienceqa": ("ScienceQA-IMG", "test"),
    "mmstar": ("", "mmstar"),
    "mmbench": ("en", "dev"),
}


def _write(folder: Path, split: str, rows: list[Content], saved: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    half = -(-len(rows) // 2)
    parts = [rows[:half], rows[half:]] if len(rows) > 1 else [rows]
    if saved:
        folder = folder / split
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, part in enumerate(parts):
        table = pa.Table.from_pylist(part)
        names.append(f"{'data' if saved else split}-{number:05}-of-{len(parts):05}.{'arrow' if saved else 'parquet'}")
        if saved:
            with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        else:
            pq.write_table(table, folder / names[-1], row_group_size=16)
    if saved:
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in names]}))
        (folder / "dataset_info.json").write_text("{}")
        (folder.parent / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
