"""Data sets -> a stream of records; the only place that knows how a data file looks.

Reads JSON lines, one conversation a line, in the two spellings in common use:
    {"messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, ...], "images": ["a.jpg", ...]}
    {"conversations": [...same...], "image": "a.jpg, b.jpg"}          (MiniMind-V 2025)
`<image>` in a user's turn says where the next image goes. Never holds more than one line.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BAD_ROWS, PipelineError, brief

PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant")
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


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
        row = load_json(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise bad_row(f"not a JSON object: {brief(error)}", where) from None
    if not isinstance(row, dict):
        raise bad_row(f"expected a JSON object, got {type(row).__name__}", where)
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise bad_row("expected a list `messages` with at least one turn", where)
    images = _image_names(row, where)
    turns, used = [], 0
    for position, message in enumerate(messages):
        turn, used = _turn(message, position, used, where)
        turns.append(turn)
    if used != len(images):
        raise bad_row(f"{used} {PLACEHOLDER} placeholders for {len(images)} images", where)
    check_order([turn.role for turn in turns], where)
    return Record(where, images, tuple(turns))


def load_json(text: str) -> Any:
    """As `json.loads`, but a key that stands twice in an object is a `ValueError`: the last one would win in silence."""
    return json.loads(text, object_pairs_hook=_unique)


def bad_row(what: str, where: str, remedy: str = "mend or remove the row") -> PipelineError:
    """The error of one row."""
    return PipelineError(what, where=where, remedy=remedy, code=BAD_ROWS)


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
        raise bad_row("expected `images` as a list of file names", where)
    if any(is_half_surrogate(name) for name in names):
        raise bad_row("a name in `images` has half a surrogate pair", where)
    return tuple(names)


def is_half_surrogate(text: str) -> bool:
    """True for text that no encoder takes: JSON can spell half a surrogate pair, UTF-8 cannot."""
    return _HALF_SURROGATE.search(text) is not None


def _turn(message: object, position: int, used: int, where: str) -> tuple[Turn, int]:
    if not isinstance(message, dict):
        raise bad_row(f"turn {position}: expected an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise bad_row(f"turn {position}: role is {role!r}, expected one of {', '.join(ROLES)}", where)
    if not isinstance(content, str):
        raise bad_row(f"turn {position}: content is {type(content).__name__}, expected text", where)
    if is_half_surrogate(content):
        raise bad_row(f"turn {position}: content has half a surrogate pair", where)
    if role == "assistant" and not content.strip():
        raise bad_row(f"turn {position}: the answer is empty", where)
    if role != "user":  # only a user shows pictures; elsewhere the word is text
        return Turn(role, (content,)), used
    parts, used = split_placeholders(content, used)
    return Turn(role, parts), used


def split_placeholders(text: str, used: int) -> tuple[tuple[str | ImageSlot, ...], int]:
    """Text with `<image>` in it -> its parts, slots numbered from `used`; and the number of the next slot."""
    parts: list[str | ImageSlot] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i:
            parts.append(ImageSlot(used))
            used += 1
        if piece:
            parts.append(piece)
    return tuple(parts), used


def check_order(roles: list[str], where: str) -> None:
    """Raises `PipelineError` unless it goes [system] user assistant user assistant ... and ends on the assistant."""
    body = roles[1:] if roles[0] == "system" else roles
    if not body or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(body)):
        raise bad_row(f"turns are {', '.join(roles)}: expected user and assistant in turn", where)
    if body[-1] != "assistant":
        raise bad_row("the last turn is the user's: nothing to learn", where)
