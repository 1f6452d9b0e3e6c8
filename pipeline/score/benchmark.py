"""A benchmark's local copy -> its questions, in order and in constant memory, and the bytes of their pictures.

A copy is a folder as the hub has it (Parquet files, pictures within their rows), as `datasets` saves it (Arrow files), or of the
files that a benchmark's authors publish (published.py).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.core import BAD_ROWS, PipelineError, brief
from pipeline.records import BadRow, Images, Row, Rows, draw
from pipeline.score.published import Published, find_published
from pipeline.score.tasks import TASKS, Question, Task

PICTURE = "image"  # the column of the picture, in every task's files
SPLITS = ("train", "validation", "val", "dev", "test", "testdev", "challenge", "submission", "testA", "testB")
_SHARD = re.compile(r"([A-Za-z]+)(-\d+-of-\d+)?")


class Asked(NamedTuple):
    """A question, the row it stands in, and the name of its picture."""

    where: str
    picture: list[str]
    question: Question


class Benchmark:
    """One task over a local copy.

    Args:
        share: of the questions that are asked; which ones follows from their row or unit alone, so a unit stays whole.

    Raises `PipelineError` for a folder without the task's files, or files without its columns.
    """

    def __init__(self, name: str, folder: str | Path, *, share: float = 1.0) -> None:
        self.name, self.folder, self.task, self.share = name, Path(folder), TASKS[name], share
        self._by_id: dict[str, list[str]] = {}
        self._rows = find_published(name, self.folder) or self._of_the_hub()
        self._pictures, self._apart = self._rows, bool(self.task.pictures) and isinstance(self._rows, Rows)
        if self._apart:
            shown = find_files(self.folder, config=self.task.pictures, split=self.task.split, other=self.task.config)
            self._pictures = Rows(shown, {"id"}, picture=PICTURE, root=str(folder))
            self._require(self._pictures, {"id", PICTURE})
            self._by_id = {row.content["id"]: [self._pictures.name_within(row)] for row in _sound(self._pictures)}

    def _of_the_hub(self) -> Rows | Published:
        task = self.task
        columns = {*task.columns} if task.pictures else {*task.columns, PICTURE}
        files = find_files(self.folder, config=task.config, split=task.split, other=task.pictures)
        rows = Rows(files, columns, picture=PICTURE, root=str(self.folder))
        self._require(rows, columns)
        return rows

    @property
    def images(self) -> Images:
        """The bytes of the pictures, by the names that `questions` gives."""
        return self._pictures.images

    def questions(self) -> Iterator[Asked]:
        """Every question once; raises `PipelineError` for a row that is damaged or has no answer: a score is of all rows."""
        for row in _sound(self._rows):
            question = self._question(self.task, row)
            if question is None or (self.share < 1 and draw((question.unit or row.where).encode()) >= self.share):
                continue
            names = self._by_id.get(question.picture) if self._apart else self._rows.names(row)
            if not names:
                missing = f"picture {question.picture!r} is not in {self.task.pictures}" if question.picture else "no picture"
                raise PipelineError(missing, where=row.where, remedy="fetch the benchmark again", code=BAD_ROWS)
            yield Asked(row.where, names, question)

    def _question(self, task: Task, row: Row) -> Question | None:
        try:
            question = task.question(row.content)
            if question is not None and question.reference.strip():
                task.check(question)
        except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            what = f"not a row of {self.name}: {brief(error)}"
            raise PipelineError(what, where=row.where, remedy=_REMEDY, code=BAD_ROWS) from None
        if question is not None and not question.reference.strip():
            remedy = f"score its split {task.split}: that of a test whose answers are kept secret cannot be scored here"
            raise PipelineError("no answer to compare with", where=row.where, remedy=remedy, code=BAD_ROWS)
        return question

    def _require(self, rows: Rows, columns: set[str]) -> None:
        for file, column in rows.missing(columns):
            raise PipelineError(f"no column {column!r}, which {self.name} has", where=file, remedy=_REMEDY, code=BAD_ROWS)


_REMEDY = "take the copy that docs/evaluation.md names"


def _sound(rows: Rows | Published) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, BadRow):
            raise PipelineError(row.reason, where=row.where, remedy=row.remedy, code=BAD_ROWS)
        yield row


def find_files(folder: Path, *, config: str, split: str, other: str = "") -> list[str]:
    """The files of one split, in the order of their names; raises `PipelineError` that says what there is instead.

    Those in a folder `config` where there is one, else all but those in a folder `other`. A file is of the split that begins its
    name (`test-00000-of-00002.parquet`) or names a folder above it; where no file names any split, all are of the one asked for.
    """
    if not folder.is_dir():
        raise PipelineError("no such folder", where=str(folder), remedy="name the benchmark's copy: TASK=FOLDER", code=BAD_ROWS)
    every = sorted(path for kind in ("parquet", "arrow") for path in folder.rglob(f"*.{kind}") if path.is_file())
    if not every:
        raise PipelineError("no .parquet and no .arrow file here", where=str(folder), remedy=_REMEDY, code=BAD_ROWS)
    parts = {path: path.relative_to(folder).parts for path in every}
    within = [path for path in every if config in parts[path]] or [path for path in every if not other or other not in parts[path]]
    splits = {path: _split(parts[path]) for path in within}
    found = [path for path in within if splits[path] in (split, "")] if any(splits.values()) else within
    if not found:
        there = ", ".join(sorted({name for name in splits.values() if name})) or "no file of its own"
        what = f"no split {split!r}{f' of {config}' if config else ''}, found {there}"
        raise PipelineError(what, where=str(folder), remedy="fetch that split too", code=BAD_ROWS)
    return [str(path) for path in found]


def _split(parts: tuple[str, ...]) -> str:
    *folders, file = parts
    found = _SHARD.match(file)
    if found and found[1] in SPLITS:
        return found[1]
    return next((name for name in reversed(folders) if name in SPLITS), "")
