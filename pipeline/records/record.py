"""What a row of a data set becomes, whatever its file looks like, and the rules that every row is held to.

`pipeline.records.formats` reads files into these records; a `Record` that exists is sound: its turns alternate and end on the
assistant, and its slots are as many as its images. `python -m pipeline.check` reports on whole data sets.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.core import BAD_ROWS, PipelineError

PLACEHOLDER = "<image>"


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of one image in a turn: an index into `Record.images`."""

    index: int


class Turn(NamedTuple):
    """What one side says: `parts` are texts and the places of images; a system's and an assistant's are one text.

    `trained`: whether an answer is supervised; one that is not is still read by the model.
    """

    role: str
    parts: tuple[str | ImageSlot, ...]
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation: `where` names its file and line; `images` are names within the data set's image root."""

    where: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def load_json(text: str) -> Any:
    """As `json.loads`, but a key that stands twice in an object is a `ValueError`: the last one would win in silence."""
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    return _DECODER.decode(text)


def bad_row(what: str, where: str, remedy: str = "mend or remove the row") -> PipelineError:
    """The error of one row."""
    return PipelineError(what, where=where, remedy=remedy, code=BAD_ROWS)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def is_half_surrogate(text: str) -> bool:
    """True for text that no encoder takes: JSON can spell half a surrogate pair, UTF-8 cannot."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def split_placeholders(text: str, used: int) -> tuple[tuple[str | ImageSlot, ...], int]:
    """Text with `<image>` in it -> its parts, slots numbered from `used`; and the number of the next slot."""
    if PLACEHOLDER not in text:
        return ((text,) if text else ()), used
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
    if not body or body != (["user", "assistant"] * len(body))[: len(body)]:
        raise bad_row(f"turns are {', '.join(roles)}: expected user and assistant in turn", where)
    if body[-1] != "assistant":
        raise bad_row("the last turn is the user's: nothing to learn", where)
