"""A folder of pictures or a .jsonl of questions in, an answer for each out, as they are made: a table, or JSON lines in a pipe.

A picture that cannot be used costs its own row. Rows of a .jsonl have `image` or `images`, names beside the file, and
`question` or `text` unless one question is asked of all; `id` and `question_id` come out again.
"""

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.chat.assistant import Assistant, Sampling
from pipeline.chat.options import Settings
from pipeline.chat.paths import SUFFIXES, read_picture, show
from pipeline.chat.transcript import Transcript
from pipeline.core import BAD_ROWS, PipelineError, prefetch, quiet_libraries
from pipeline.core.devices import pick_batch, pick_device, pick_workers
from pipeline.records import BadRow, ImageError, JsonLines, digest

KEPT = 512  # features of the latest pictures, so that many questions about one encode it once
PROMPTS = 64  # answered together at most
KEYS = ("id", "question_id")

Opened = list[tuple[bytes, "np.ndarray | torch.Tensor"]]  # of a row's pictures: hash, and pixels or features


@dataclass(slots=True)
class Asked:
    """One row: what is asked of which files, what came of it, and the names it came with."""

    paths: list[Path]
    text: str
    kept: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    answer: str = ""

    def row(self) -> dict[str, Any]:
        """As it is written: the answer, or what is wrong."""
        said = {"error": self.problem} if self.problem else {"answer": self.answer}
        return {**self.kept, "pictures": [show(path) for path in self.paths], "question": self.text, **said}


def ask_all(source: Path, question: str, settings: Settings) -> None:
    """Answer all rows of `source`; raises `PipelineError` where it has none, or none that can be answered."""
    rows = _lines(source, question) if source.is_file() else _folder(source, question)
    transcript = Transcript(settings.save) if settings.save else None
    quiet_libraries()
    batch = min(PROMPTS, pick_batch("auto", pick_device(settings.device)))
    out, counted = _Output(several=not question), [0, 0]
    answering = _Answering(Assistant(settings.model, device=settings.device, batch=batch), Sampling(*settings.drawn))
    ready = prefetch(rows, answering.open, depth=2 * batch, threads=pick_workers("auto"))
    while part := [(asked, found) for asked, found in islice(ready, batch)]:
        for asked in answering.answer(part):
            counted[bool(asked.problem)] += 1
            out.add(asked)
            if transcript:
                more = {**asked.kept, **({"error": asked.problem} if asked.problem else {})}
                names = [show(path) for path in asked.paths]
                transcript.add(names, asked.text, asked.answer, new_topic=True, **more)
    good, bad = counted
    if bad:
        print(f"{good:,} answered, {bad:,} could not be", file=sys.stderr, flush=True)
    if not good:
        raise PipelineError("nothing here could be answered" if bad else "no pictures here", where=show(source), code=BAD_ROWS)


class _Answering:
    """Rows through the model, many at a time."""

    def __init__(self, assistant: Assistant, sampling: Sampling) -> None:
        self._assistant, self._sampling = assistant, sampling
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def open(self, asked: Asked) -> Opened:
        """Hash of each picture, and its features where they are known, else its pixels; run by threads, ahead of need."""
        found: Opened = []
        try:
            for path in asked.paths if not asked.problem else ():
                data = read_picture(path)
                key = digest(data)
                known = self._features.get(key)
                found.append((key, self._assistant.encoder.preprocess(data, where=show(path)) if known is None else known))
        except (ImageError, MemoryError) as error:
            asked.problem = error.what if isinstance(error, ImageError) else "no memory left to decode it"
        return found

    def answer(self, part: list[tuple[Asked, Opened]]) -> list[Asked]:
        """The same rows, answered; those that have a problem are left as they are."""
        good = [(asked, found) for asked, found in part if not asked.problem]
        here, new = {}, {}
        for key, value in (each for _, found in good for each in found):
            known = value if isinstance(value, torch.Tensor) else self._features.get(key)
            if known is not None:
                here[key] = known
            else:
                new[key] = value
        if new:
            features = self._assistant.encoder.encode(torch.from_numpy(np.stack(list(new.values()))), ["a picture"] * len(new))
            here.update(zip(new, features.cpu(), strict=True))
        self._features.update(here)
        questions = [(asked.text, [here[key] for key, _ in found]) for asked, found in good]
        for (asked, _), said in zip(good, self._assistant.answer_all(questions, self._sampling), strict=True):
            if isinstance(said, PipelineError):
                asked.problem = said.line()
            else:
                asked.answer = said
        while len(self._features) > KEPT:
            self._features.popitem(last=False)
        return [asked for asked, _ in part]


class _Output:
    """A table in a terminal, JSON lines elsewhere."""

    def __init__(self, *, several: bool) -> None:
        self._console = Console(highlight=False) if sys.stdout.isatty() else None
        self._several = several
        if self._console:
            self._print("picture", "question", "answer", style="bold")

    def add(self, asked: Asked) -> None:
        if not self._console:
            print(json.dumps(asked.row(), ensure_ascii=False), flush=True)
            return
        names = ", ".join(show(path) for path in asked.paths)
        self._print(names, asked.text, asked.problem or asked.answer, style="red" if asked.problem else "")

    def _print(self, name: str, question: str, answer: str, *, style: str) -> None:
        assert self._console
        table = Table.grid(padding=(0, 2))
        wide = max(16, self._console.width // 3)
        table.add_column(width=wide, overflow="fold")
        if self._several:
            table.add_column(width=wide, overflow="fold")
        table.add_column(overflow="fold")
        cells = (name, question, answer) if self._several else (name, answer)
        table.add_row(*(Text("".join(c for c in cell if c.isprintable() or c == "\n")) for cell in cells), style=style)
        self._console.print(table)


def _refuse(error: OSError) -> NoReturn:
    raise PipelineError(
        f"cannot be listed: {error.strerror}", where=show(Path(error.filename)), remedy=f"chmod +rx {error.filename}"
    )


def _folder(folder: Path, question: str) -> Iterator[Asked]:
    """Pictures in a folder and those within it, by their suffixes and in order; hidden ones and linked folders are left out."""
    if not question:
        raise PipelineError("a folder needs a question", where=show(folder), remedy='python -m pipeline.chat FOLDER "what is it?"')
    for path, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Asked([Path(path, name)], question)


def _lines(file: Path, question: str) -> Iterator[Asked]:
    for row in JsonLines(str(file)).rows():
        if isinstance(row, BadRow):
            yield Asked([], question, problem=f"line {row.row}: {row.reason}")
            continue
        yield _asked(row.content, file.parent, question, f"line {row.row}")


def _asked(content: dict[str, Any], beside: Path, question: str, where: str) -> Asked:
    """A row of the file; what is wrong with it is its problem."""
    named: Any = next((content[key] for key in ("images", "image", "picture") if content.get(key)), [])
    names = named if isinstance(named, list) else [named]
    text = question or next((content[key] for key in ("question", "text") if content.get(key)), "")
    kept = {key: content[key] for key in KEYS if key in content}
    if not isinstance(text, str) or not text:
        return Asked([], question, kept, f"{where}: no question -> name it `question`, or ask one of all rows")
    if not all(isinstance(name, str) for name in names):
        return Asked([], text, kept, f"{where}: `image` is no name of a file")
    paths = [beside / name for name in names]
    if len(names) == 1 and "," in names[0] and not paths[0].exists():  # a name may have commas; else they part names
        paths = [beside / name.strip() for name in names[0].split(",")]
    return Asked(paths, text.replace("<image>", "").strip(), kept)
