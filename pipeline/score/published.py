"""Benchmarks as their authors publish them, JSON or text beside a folder of pictures: rows with the columns of the hub's copies.

VQAv2's two files, GQA's, TextVQA's, POPE's three, MME's folders and ChartQA's. The first picture tells where all lie.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.core import BAD_ROWS, PipelineError, brief
from pipeline.records import BadRow, ImageRoot, JsonArray, JsonLines, Row, load_json

Content = dict[str, Any]
MAX_FILE = 1 << 30  # bytes of a file that is read whole
MEND = "take the files as their authors publish them"


def _vqav2(files: list[Path]) -> Iterator[Row | BadRow]:
    """`...val2014_questions.json` and `...val2014_annotations.json`: answers in the order of their file, questions by their id."""
    asked: dict[int, tuple[str, int]] = {}
    by_kind = {re.split(r"_|\.", file.name)[-2]: file for file in files}
    for kind in ("questions", "annotations"):
        if kind not in by_kind:
            raise PipelineError(f"no file of its {kind}", where=str(files[0].parent), remedy="fetch it too", code=BAD_ROWS)
    for row in JsonArray(str(by_kind["questions"]), "questions").rows():
        if isinstance(row, BadRow):
            yield row
        else:
            asked[row.content["question_id"]] = (row.content["question"], row.content["image_id"])
    for row in JsonArray(str(by_kind["annotations"]), "annotations").rows():
        if isinstance(row, Row):
            question, picture = asked.pop(row.content["question_id"])
            row.content.update(question=question, image=f"COCO_val2014_{picture:012}.jpg")
        yield row
    if asked:
        what = f"{len(asked):,} questions have no answer, the first is {next(iter(asked))}"
        raise PipelineError(what, where=str(by_kind["annotations"]), remedy=MEND, code=BAD_ROWS)


def _gqa(files: list[Path]) -> Iterator[Row | BadRow]:
    """`testdev_balanced_questions.json`: an object of questions by id."""
    for file in files:
        for number, content in enumerate(load_json(_text(file)).values()):
            yield Row(str(file), number, {**content, "image": f"{content['imageId']}.jpg"}, None)


def _textvqa(files: list[Path]) -> Iterator[Row | BadRow]:
    """`TextVQA_0.5.1_val.json`: an object with an array `data`."""
    return _each(files, lambda file: JsonArray(file, "data"), lambda row, _: {**row, "image": f"{row['image_id']}.jpg"})


def _pope(files: list[Path]) -> Iterator[Row | BadRow]:
    """`coco_pope_random.json`, `_popular`, `_adversarial`: JSON lines."""

    def columns(row: Content, file: Path) -> Content:
        return {"question": row["text"], "answer": row["label"], "category": file.stem.rsplit("_", 1)[1], "image": row["image"]}

    return _each(files, JsonLines, columns)


def _chartqa(files: list[Path]) -> Iterator[Row | BadRow]:
    """`test_human.json` and `test_augmented.json`: arrays."""

    def columns(row: Content, file: Path) -> Content:
        kind = f"{file.stem.removeprefix('test_')}_test"
        return {"question": row["query"], "answer": row["label"], "type": kind, "image": row["imgname"]}

    return _each(files, JsonArray, columns)


def _mme(files: list[Path]) -> Iterator[Row | BadRow]:
    """A folder a category; a picture's text file, beside it or in `questions_answers_YN`, has a question and its answer a line."""
    for file in files:
        folder = file.parent.parent if file.parent.name == "questions_answers_YN" else file.parent
        places = [place / f"{file.stem}{kind}" for place in (folder / "images", folder) for kind in (".jpg", ".png")]
        shown = next((place for place in places if place.exists()), places[0]).absolute()
        known = {"category": folder.name, "question_id": file.stem, "image": str(shown)}
        for number, line in enumerate(filter(None, map(str.strip, _text(file).splitlines())), 1):
            question, answer = line.split("\t")
            yield Row(str(file), number, {"question": question, "answer": answer, **known}, None)


def _each(
    files: list[Path], reader: Callable[[str], JsonArray | JsonLines], columns: Callable[[Content, Path], Content]
) -> Iterator[Row | BadRow]:
    for file in files:
        for row in reader(str(file)).rows():
            yield row if isinstance(row, BadRow) else row._replace(content=columns(row.content, file))


def _text(file: Path) -> str:
    if file.stat().st_size > MAX_FILE:
        raise PipelineError(f"more than {MAX_FILE >> 30} GiB", where=str(file), remedy=MEND, code=BAD_ROWS)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PipelineError(f"not UTF-8: {brief(error)}", where=str(file), remedy=MEND, code=BAD_ROWS) from None


# Task -> which files are its rows, by their names, one of each kind that the pattern's last group tells; and how they are read
PUBLISHED: dict[str, tuple[str, Callable[[list[Path]], Iterator[Row | BadRow]]]] = {
    "vqav2": (r"(?:.*val2014_)?(questions|annotations)\.json", _vqav2),
    "gqa": (r"(testdev_balanced_questions)\.json", _gqa),
    "textvqa": (r"(TextVQA)_.*_val\.json", _textvqa),
    "pope": (r"coco_pope_(random|popular|adversarial)\.json", _pope),
    "mme": (r"(?!README).*\.txt", _mme),  # a file a picture
    "chartqa": (r"test_(human|augmented)\.json", _chartqa),
}


class Published:
    """Rows of one task from its authors' files, as `Rows` gives those of the hub's.

    Attributes:
        images: its pictures, by the names that `names` gives.
    """

    def __init__(self, task: str, folder: Path, files: list[Path]) -> None:
        self._task, self._files = task, files
        self.images, self._below = ImageRoot(folder), folder.absolute()
        first = next(iter(self), None)
        if isinstance(first, Row):
            shown = glob.escape(Path(first.content["image"]).name)
            self._below = min(self._below.rglob(shown), default=self._below / "_").parent

    def __iter__(self) -> Iterator[Row | BadRow]:
        """Every row once; raises `PipelineError` for one that has not what its authors give each."""
        row: Row | BadRow | None = None
        try:
            for row in PUBLISHED[self._task][1](self._files):
                if isinstance(row, Row) and not (isinstance(row.content["image"], str) and Path(row.content["image"]).name):
                    raise TypeError(f"its picture is {row.content['image']!r:.40}")
                yield row
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            where = row.where if row else str(self._files[0])
            what = f"behind this, not a row of {self._task} as published: {brief(error)}"
            raise PipelineError(what, where=where, remedy=MEND, code=BAD_ROWS) from None

    def names(self, row: Row) -> list[str]:
        """What `images` calls the row's picture."""
        return [os.path.relpath(self._below / row.content["image"], os.path.abspath(self.images.path))]


def find_published(task: str, folder: Path) -> Published | None:
    """The authors' own files below a folder; None where there are none, or the hub's lie there.

    Raises `PipelineError` where two of them would give the same rows.
    """
    if task not in PUBLISHED or any(next(folder.rglob(f"*.{kind}"), None) for kind in ("parquet", "arrow")):
        return None
    found: dict[str, Path] = {}
    for path in sorted(path for kind in ("json", "txt") for path in folder.rglob(f"*.{kind}")):
        if match := re.fullmatch(PUBLISHED[task][0], path.name):
            other = found.setdefault(match[1] if match.lastindex else str(path), path)
            if other != path:
                what = f"both {other.name} and {path.name} are here, which are the same part of {task}"
                raise PipelineError(what, where=str(path), remedy="keep the one that is to be scored", code=BAD_ROWS)
    return Published(task, folder, list(found.values())) if found else None
