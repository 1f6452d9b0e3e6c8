"""A row's content -> a record: the spellings in which conversations and captions come, told apart by their keys.

    messages | conversations: [{"role": "user" | "assistant" | "system", "content": TEXT | PARTS}]    ours, MiniMind-V, OpenAI
    messages | conversations: [{"from": "human" | "gpt" | "system", "value": TEXT}]                   LLaVA
    text | caption, with one picture                                                                  caption tables

`<image>` in a user's text takes the next of the row's pictures. Where content comes as parts, a picture stands where its
part stands and `<image>` is plain text, as OpenAI writes it. What would change a conversation unread is refused.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.core import PipelineError, brief
from pipeline.records.formats.pictures import is_filler, listed
from pipeline.records.record import (
    PLACEHOLDER,
    ImageSlot,
    Turn,
    bad_row,
    check_order,
    is_half_surrogate,
    load_json,
    split_placeholders,
)

TURN_KEYS = ("messages", "conversations")
IMAGE_KEYS = ("images", "image", "image_bytes", "image_path", "file_name")
TEXT_KEYS = ("text", "caption", "txt")
OTHER_MEDIA = ("video", "videos", "audio", "audios")
_OTHER_MEDIA = frozenset(OTHER_MEDIA)
_USUAL_TURN = {"role", "content"}
UNREAD_IN_TURN = ("tool_calls", "function_call", "functions", "tools", "reasoning_content", "refusal", "audio")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PLAIN_ROLES = ("system", "user", "assistant")
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a row keeps its parts; "" = whichever of the usual names it has."""

    turns: str = ""
    images: str = ""
    text: str = ""

    def wanted(self) -> frozenset[str]:
        """Every key or column that may be read."""
        usual = (*TURN_KEYS, *IMAGE_KEYS, *TEXT_KEYS, *OTHER_MEDIA)
        return frozenset(name for name in (*usual, self.turns, self.images, self.text) if name)

    def check(self, names: list[str], where: str) -> None:
        """Raises `PipelineError` when a file with these columns can hold neither conversations nor captions."""
        for key, name in (("turns", self.turns), ("images", self.images), ("text", self.text)):
            if name and name not in names:
                raise PipelineError(f"no column {name!r}; it has {_list(names)}", where=where, remedy=f"set columns.{key}")
        if {self.turns, *TURN_KEYS} & set(names):
            return
        for key, kind, usual in (("text", "a caption", TEXT_KEYS), ("images", "its picture", IMAGE_KEYS)):
            if not {getattr(self, key), *usual} & set(names):
                raise PipelineError(
                    f"expected {' or '.join(TURN_KEYS)}, or {kind} in {' or '.join(usual)}; it has {_list(names)}",
                    where=where,
                    remedy=f"set columns.turns or columns.{key}",
                )


USUAL = Columns()


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become records: columns, what a caption answers, and what a picture without `<image>` means."""

    columns: Columns = USUAL
    prompt: str = PLACEHOLDER
    unplaced: str = "refuse"  # or "first": pictures without a place stand before the first question


@dataclass(slots=True)
class _Build:
    """A conversation on its way: `given` are the row's pictures, `shown` those placed so far, in slot order."""

    where: str
    given: list[Any]
    shown: list[Any]
    taken: int = 0
    has_parts: bool = False


def turns_and_pictures(content: dict[str, Any], reading: Reading, *, where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """A row's turns and its pictures in slot order, each as the row has it; raises `PipelineError` naming what is wrong."""
    if not _OTHER_MEDIA.isdisjoint(content):
        for key in OTHER_MEDIA:
            if content.get(key):
                raise bad_row(f"has {key!r}, which is not read", where)
    messages = _pick(content, reading.columns.turns, TURN_KEYS, "turns", where)
    pictures = _pick(content, reading.columns.images, IMAGE_KEYS, "images", where)
    work = _Build(where, listed(pictures, where, part_at_commas=messages is not None), [])
    if messages is None:
        turns = _caption(content, reading, work)
    else:
        turns = _conversation(messages, work)
    if work.given and not work.shown and not work.has_parts:
        turns = _place(turns, work, reading)
    if work.taken != len(work.given):
        raise bad_row(f"{work.taken} {PLACEHOLDER} placeholders for {len(work.given)} images", where)
    check_order([turn.role for turn in turns], where)
    return tuple(turns), work.shown


def _pick(content: dict[str, Any], named: str, usual: tuple[str, ...], kind: str, where: str) -> Any:
    """The value under the column that the user named, or under the one usual key that is there; None without any."""
    found = [key for key in ((named,) if named else usual) if content.get(key) is not None]
    full = [key for key in found if content[key] not in ("", [])] if len(found) > 1 else found
    if len(full) > 1:
        raise bad_row(f"has {_list(full)}: which one counts?", where, f"set columns.{kind}")
    return content[(full or found)[0]] if found else None


def _list(names: list[str]) -> str:
    text = ", ".join(names)
    return text if len(text) < 300 else text[:300] + "…"


def _caption(content: dict[str, Any], reading: Reading, work: _Build) -> list[Turn]:
    caption = _pick(content, reading.columns.text, TEXT_KEYS, "text", work.where)
    if caption is None:
        raise bad_row(f"no {' or '.join(TURN_KEYS)} and no {reading.columns.text or ' or '.join(TEXT_KEYS)}", work.where)
    if not work.given:
        raise bad_row("a caption without an image", work.where, "mend or remove the row, or set columns.images")
    return [_turn("user", reading.prompt, 0, work), _turn("assistant", caption, 1, work)]


def _conversation(messages: Any, work: _Build) -> list[Turn]:
    if isinstance(messages, str):
        if is_half_surrogate(messages):
            raise bad_row("the conversation is not UTF-8 or has half a surrogate pair", work.where)
        try:
            messages = load_json(messages)
        except (ValueError, RecursionError) as error:
            raise bad_row(f"the conversation is not JSON: {brief(error)}", work.where) from None
    if not isinstance(messages, list) or not messages:
        raise bad_row("expected a list of turns with at least one", work.where)
    turns: list[Turn] = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_row(f"turn {position}: expected an object, got {type(message).__name__}", work.where)
        if None in message.values():
            message = {key: value for key, value in message.items() if value is not None}
        role, content = _speaker(message, position, work.where)
        turns.append(_turn(role, content, position, work))
    return _join_questions(turns) if work.has_parts else turns


def _speaker(message: dict[str, Any], position: int, where: str) -> tuple[str, Any]:
    """Role and content in either spelling; raises for one that carries more than is read."""
    if message.keys() == _USUAL_TURN and message["role"] in _PLAIN_ROLES:
        return message["role"], message["content"]
    if extra := next((key for key in UNREAD_IN_TURN if message.get(key)), None):
        raise bad_row(f"turn {position}: has {extra!r}, which is not read", where)
    if message.get("weight", 1) != 1:
        raise bad_row(f"turn {position}: weight {message['weight']!r}: every answer is trained on", where)
    spoken, written = "from" in message or "value" in message, "role" in message or "content" in message
    if spoken and written:
        raise bad_row(f"turn {position}: both role/content and from/value", where)
    role, content, roles = (
        (message.get("from"), message.get("value"), SPEAKERS) if spoken else (message.get("role"), message.get("content"), ROLES)
    )
    if not isinstance(role, str) or role not in roles:
        raise bad_row(f"turn {position}: role is {role!r:.100}, expected one of {', '.join(roles)}", where)
    return roles[role], content


def _turn(role: str, content: Any, position: int, work: _Build) -> Turn:
    if isinstance(content, list):
        work.has_parts = True
        parts = _join_texts([piece for part in content for piece in _part(part, role, position, work)])
    elif isinstance(content, str):
        parts = (content,)
        if role == "user":
            parts, slots = split_placeholders(content, len(work.shown))
            for _ in range(slots - len(work.shown)):
                _take(work)
    else:
        raise bad_row(f"turn {position}: content is {type(content).__name__}, expected text", work.where)
    said = content if isinstance(content, str) else "".join([part for part in parts if isinstance(part, str)])
    if is_half_surrogate(said):
        raise bad_row(f"turn {position}: content is not UTF-8 or has half a surrogate pair", work.where)
    if role == "assistant" and (not said or said.isspace()):
        raise bad_row(f"turn {position}: the answer is empty", work.where)
    return Turn(role, parts if role == "user" else (said,))


def _take(work: _Build) -> ImageSlot:
    """A slot for the next of the row's pictures; too many are counted, and told when the row ends."""
    if work.taken < len(work.given):
        work.shown.append(work.given[work.taken])
    else:
        work.shown.append(None)
    work.taken += 1
    return ImageSlot(len(work.shown) - 1)


def _part(part: Any, role: str, position: int, work: _Build) -> list[str | ImageSlot]:
    """One part of a content list, as OpenAI and the Hugging Face chat templates write them."""
    where = work.where
    if not isinstance(part, dict):
        raise bad_row(f"turn {position}: a part is {type(part).__name__}, expected an object", where)
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise bad_row(f"turn {position}: a text part without text", where)
        return [part["text"]] if part["text"] else []
    if kind not in ("image", "image_url", "input_image"):
        raise bad_row(f"turn {position}: a part of type {kind!r:.100}, expected text, image or image_url", where)
    if role != "user":
        raise bad_row(f"turn {position}: only a user shows pictures", where)
    sources = [part[key] for key in ("image_url", "image", "url", "path") if key in part]
    if len(sources) > 1:
        raise bad_row(f"turn {position}: an image part with {len(sources)} sources", where)
    if not sources:
        return [_take(work)]
    source = sources[0]
    if isinstance(source, dict) and "url" in source:
        source = source["url"]
    work.shown.append(listed([source], where)[0])
    return [ImageSlot(len(work.shown) - 1)]


def _join_texts(pieces: list[str | ImageSlot]) -> tuple[str | ImageSlot, ...]:
    parts: list[str | ImageSlot] = []
    for piece in pieces:
        if isinstance(piece, str) and parts and isinstance(parts[-1], str):
            parts[-1] += piece
        else:
            parts.append(piece)
    return tuple(parts)


def _join_questions(turns: list[Turn]) -> list[Turn]:
    """OpenAI's own example asks in two turns, the question and its picture: one question, a line each."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and turn.role == joined[-1].role == "user":
            joined[-1] = Turn("user", _join_texts([*joined[-1].parts, "\n", *turn.parts]))
        else:
            joined.append(turn)
    return joined


def _place(turns: list[Turn], work: _Build, reading: Reading) -> list[Turn]:
    """A row with pictures and no place for them."""
    if len(work.given) == 1 and is_filler(work.given[0]):  # MiniMind-V 2026: its rows without a picture carry a black one
        work.given = []
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if reading.unplaced != "first" or first is None:
        return turns
    slots = [_take(work) for _ in work.given]
    turns[first] = Turn("user", _join_texts([*slots, "\n", *turns[first].parts]))
    return turns
