"""Reading to the end what may be broken, within limits of time: rows in = rows out, and every error is one line."""

import base64
import io
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pipeline.core.errors import PipelineError
from pipeline.records.formats import BadRow, SourceSpec, open_source
from pipeline.records.images import ImageError
from pipeline.records.record import ImageSlot, Record

Png = Callable[[int], bytes]

FIXTURES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ASKED, ANSWER = {"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}

GOOD: dict[str, Any] = {"messages": [ASKED, ANSWER], "images": ["a.png"]}

PIXEL = base64.b64encode(b"\x89PNG").decode()


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A hang is a failure that says so, not a test run that never ends."""

    def strike(*_: object) -> None:
        raise AssertionError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, strike)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def require_one_line(error: PipelineError) -> None:
    assert len(error.line().splitlines()) == 1


def drain(spec: SourceSpec, *, read: bool = False) -> list[Record | BadRow]:
    """Every row of a source, each checked: a sound record or one line; with `read`, its embedded pictures too."""
    source, rows = open_source(spec), []
    for row in source.records():
        if isinstance(row, BadRow):
            assert len(row.line().splitlines()) == 1
            assert row.line().startswith(row.file)
            assert row.reason
            assert row.remedy
            assert row.rows > 0
        else:
            slots = [part.index for turn in row.turns for part in turn.parts if isinstance(part, ImageSlot)]
            assert slots == list(range(len(row.images)))
            assert row.turns[-1].role == "assistant"
            for text in (*row.images, *(part for turn in row.turns for part in turn.parts if isinstance(part, str))):
                text.encode("utf-8")
            if read:
                read_all(source, row)
        rows.append(row)
    return rows


def read_all(source: Any, row: Record) -> None:
    for name in row.images:
        try:
            assert isinstance(source.images.read(name), bytes)
        except ImageError as error:
            require_one_line(error)


def opened_or_refused(spec: SourceSpec, *, read: bool = False) -> list[Record | BadRow] | None:
    """The rows, or None where the file as a whole is refused in one line."""
    try:
        return drain(spec, read=read)
    except PipelineError as error:
        require_one_line(error)
        return None


def total(rows: list[Record | BadRow]) -> int:
    return sum(row.rows if isinstance(row, BadRow) else 1 for row in rows)


def said(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER]}


def spoken(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns]}


def tarred(members: list[tuple[str, bytes]], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


plain = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)

texts = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["<image>", "<image><image>x", "\ud800", "", "http://x/y", "data:;base64,"]
)
