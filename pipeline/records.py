"""Data sets -> a stream of records; the only place that knows how a data file looks.

Reads JSON lines, one conversation a line, in the two spellings in common use:
    {"messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, ...], "images": ["a.jpg", ...]}
    {"conversations": [...same...], "image": "a.jpg, b.jpg"}          (MiniMind-V 2025)
`<image>` in a user's turn says where the next image goes. Never holds more than one line.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BAD_ROWS, PipelineError, brief

PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of one image in a turn: an index into `Record.images`."""

    index: int


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    parts: tuple[str | ImageSlot, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation: `where` names its file and line; `images` are names within the data set's image root."""

    where: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_records(path: str | Path, *, limit: int = 0) -> Iterator[Record]:
    """Records in file order, at most `limit` (0 = all); raises `PipelineError` naming file and line."""
    source = Path(path)
    if not source.is_file():
        raise PipelineError("no such file", where=str(path), remedy="set data.*.records")
    found = 0
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            yield parse(line, where=f"{path}:{number}")
            found += 1
            if found == limit:
                return
    if not found:
        raise PipelineError("no rows", where=str(path), remedy="set data.*.records")


def parse(line: bytes, *, where: str) -> Record:
    """One line -> one record, checked; raises `PipelineError` naming the line and the field."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _bad(f"not a JSON object: {brief(error)}", where) from None
    if not isinstance(row, dict):
        raise _bad(f"expected a JSON object, got {type(row).__name__}", where)
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise _bad("expected a list `messages` with at least one turn", where)
    images = _image_names(row, where)
    turns, used = [], 0
    for position, message in enumerate(messages):
        turn, used = _turn(message, position, used, where)
        turns.append(turn)
    if used != len(images):
        raise _bad(f"{used} {PLACEHOLDER} placeholders for {len(images)} images", where)
    _check_order([turn.role for turn in turns], where)
    return Record(where, images, tuple(turns))


def _bad(what: str, where: str) -> PipelineError:
    return PipelineError(what, where=where, remedy="mend or remove the row", code=BAD_ROWS)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content


def _image_names(row: dict[str, Any], where: str) -> tuple[str, ...]:
    names = row.get("images", row.get("image", []))
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")] if names else []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _bad("expected `images` as a list of file names", where)
    if any(_is_half_surrogate(name) for name in names):
        raise _bad("a name in `images` has half a surrogate pair", where)
    return tuple(names)


def _is_half_surrogate(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _turn(message: object, position: int, used: int, where: str) -> tuple[Turn, int]:
    if not isinstance(message, dict):
        raise _bad(f"turn {position}: expected an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _bad(f"turn {position}: role is {role!r}, expected one of {', '.join(ROLES)}", where)
    if not isinstance(content, str):
        raise _bad(f"turn {position}: content is {type(content).__name__}, expected text", where)
    if _is_half_surrogate(content):
        raise _bad(f"turn {position}: content has half a surrogate pair", where)
    if role == "assistant" and not content.strip():
        raise _bad(f"turn {position}: the answer is empty", where)
    if role != "user":  # only a user shows pictures; elsewhere the word is text
        return Turn(role, (content,)), used
    parts: list[str | ImageSlot] = []
    for i, text in enumerate(content.split(PLACEHOLDER)):
        if i:
            parts.append(ImageSlot(used))
            used += 1
        if text:
            parts.append(text)
    return Turn(role, tuple(parts)), used


def _check_order(roles: list[str], where: str) -> None:
    body = roles[1:] if roles[0] == "system" else roles
    if not body or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(body)):
        raise _bad(f"turns are {', '.join(roles)}: expected user and assistant in turn", where)
    if body[-1] != "assistant":
        raise _bad("the last turn is the user's: nothing to learn", where)
