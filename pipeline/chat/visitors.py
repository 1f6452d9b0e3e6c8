"""Who is on the page: a talk of its own for each, the model that it is with, and the files that it brought."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.look import look_back, sheet_of
from pipeline.chat.paths import read_picture
from pipeline.core import PipelineError, as_line
from pipeline.records import Turn

UNSENT = 600  # seconds after which an upload that was in no question is taken for forgotten
LOADED = 2  # models held in memory: one in use, and the one before


@dataclass(slots=True)
class Exchange:
    """A question with its pictures (paths of uploads), and the answer, or what was wrong."""

    pictures: list[str]
    question: str
    answer: str = ""
    failed: bool = False
    ended: bool = False


@dataclass(slots=True)
class Visitor:
    """One open page. `features` are those of the pictures in `exchanges`, by path."""

    model: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    stop: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        """A new topic."""
        self.exchanges.clear()
        self.features.clear()

    def messages(self) -> list[dict[str, Any]]:
        """The talk as the page shows it."""
        shown: list[dict[str, Any]] = []
        for exchange in self.exchanges:
            shown += [{"role": "user", "content": {"path": path}} for path in exchange.pictures]
            if exchange.question:
                shown.append({"role": "user", "content": exchange.question})
            answer = exchange.answer or ("(no words)" if exchange.ended else "…")
            shown.append({"role": "assistant", "content": f"⚠ {answer}" if exchange.failed else answer})
        return shown


class Models:
    """Checkpoints by the names that the page offers; loaded when first asked for."""

    def __init__(self, folders: list[Path], load: Callable[[Path], Assistant]) -> None:
        self.names = [str(folder) for folder in folders]
        self._load, self._ready, self._lock = load, OrderedDict[str, Assistant](), threading.Lock()

    def get(self, name: str) -> Assistant:
        """Raises `PipelineError` for one that cannot be loaded, or that the page does not offer."""
        if name not in self.names:
            raise PipelineError("no such model", where=name)
        with self._lock:
            if name not in self._ready:
                while len(self._ready) >= LOADED:
                    self._ready.popitem(last=False)
                self._ready[name] = self._load(Path(name))
            self._ready.move_to_end(name)
            return self._ready[name]


class Visitors:
    """All open pages, by Gradio's name of each (random, and known to that page alone); `folder` has the files they brought."""

    def __init__(self, models: Models, folder: Path) -> None:
        self.models, self._folder, self._kept = models, folder, set[str]()
        self._open: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def get(self, page: str) -> Visitor:
        """The visitor of a page; a new one the first time."""
        with self._lock:
            return self._open.setdefault(page, Visitor())

    def keep_files(self) -> None:
        """The files that are there now belong to all: the page's examples."""
        self._kept = {str(path) for path in self._folder.rglob("*")}

    def leave(self, page: str) -> None:
        """A page that is closed: its answer stops, its talk is forgotten, its files are deleted, and those that nobody sent."""
        with self._lock:
            visitor = self._open.pop(page, Visitor())
            others = {path for other in self._open.values() for path in other.files} | self._kept
        visitor.stop.set()
        unsent = {str(path) for path in self._folder.rglob("*") if path.is_file() and time.time() - path.stat().st_mtime > UNSENT}
        for path in (visitor.files | unsent) - others:
            with suppress(OSError):
                Path(path).unlink()

    def ask(self, visitor: Visitor, exchange: Exchange, model: str, sampling: Sampling) -> Iterator[None]:
        """Ask; returns each time there is more to show. What goes wrong becomes the answer, and joins no talk."""
        visitor.stop.clear()
        visitor.files |= set(exchange.pictures)
        if visitor.model != model:  # another encoder's features would mean nothing to it
            visitor.forget()
            visitor.model = model
        visitor.exchanges.append(exchange)
        yield
        try:
            assistant = self.models.get(model)
            for path in exchange.pictures:
                if path not in visitor.features:
                    visitor.features[path] = assistant.look(path, name=Path(path).name)
            talk = _conversation(visitor, assistant)
            for piece in assistant.answer(talk, sampling, stop=visitor.stop):
                exchange.answer += piece
                yield
        except Exception as error:
            exchange.answer, exchange.failed = as_line(error).line(), True
        exchange.answer, exchange.ended = exchange.answer.strip(), True
        yield

    def look_back(self, visitor: Visitor, method: str) -> Path:
        """A picture of what the words of the last answer came from; raises `PipelineError` where there is none to look back at."""
        if not visitor.exchanges or not visitor.exchanges[-1].ended or visitor.exchanges[-1].failed:
            raise PipelineError("no answer yet", remedy="show a picture and ask")
        assistant = self.models.get(visitor.model)
        talk = _conversation(visitor, assistant)
        talk.turns.append(Turn("assistant", (visitor.exchanges[-1].answer or " ",)))
        paths = [path for exchange in visitor.exchanges if not exchange.failed for path in exchange.pictures]
        files = [read_picture(Path(path), name=Path(path).name) for path in paths]
        seen = look_back(assistant, talk.turns, files, [method])
        made = self._folder / f"looked-{secrets.token_hex(8)}.png"
        visitor.files.add(str(made))
        sheet_of(assistant, files, seen, across=3).save(made)  # the page has a narrow place for it
        return made


def _conversation(visitor: Visitor, assistant: Assistant) -> Conversation:
    """What the model is told: all that went well, and the last question."""
    talk = Conversation()
    *before, last = visitor.exchanges
    for exchange in before:
        if not exchange.failed:
            assistant.ask(talk, exchange.question, [visitor.features[path] for path in exchange.pictures])
            talk.turns.append(Turn("assistant", (exchange.answer or " ",)))
    assistant.ask(talk, last.question, [visitor.features[path] for path in last.pictures])
    return talk
