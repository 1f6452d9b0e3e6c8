"""One turn of a conversation in any spelling: who speaks, whether the answer is trained, its texts and where pictures stand."""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.records.formats.keys import Columns, is_blank, is_empty, is_harmless, not_read
from pipeline.records.formats.pictures import listed
from pipeline.records.record import ImageSlot, Turn, bad_row, is_half_surrogate, split_placeholders

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PLAIN_ROLES = ("system", "user", "assistant")
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
PAIRS = (("user", "assistant"), ("question", "answer"), ("input", "output"))  # a question and its answer in one object
_SPELLING = frozenset({"role", "content", "from", "value"})
_USUAL_TURN, _LLAVA_TURN = {"role", "content"}, {"from", "value"}
# Whether an answer is trained: Axolotl, ms-swift, xtuner, OpenAI, mistral-finetune, torchtune; what a true value means
MASKS = {"loss": True, "train": True, "training": True, "trainable": True, "weight": True, "masked": False, "mask": False}
_PART_KEYS = frozenset({"type", "text", "image_url", "image", "url", "path", "index"})
# How large a picture would be shown, and who may keep it: the encoder here has one size
_HARMLESS_IN_PART = frozenset({"detail", "cache_control", "min_pixels", "max_pixels", "resized_height", "resized_width", "id"})
_QWEN_IMAGE = re.compile(r"<img>([^<>\n]+)</img>")


@dataclass(slots=True)
class Build:
    """A conversation on its way: `given` are the row's pictures, `shown` those placed so far, in slot order.

    `has_parts`: contents came as parts, in which pictures have their own places. `places`: the layout has no places for
    pictures, so they stand before the first question.
    """

    where: str
    columns: Columns
    given: list[Any]
    shown: list[Any]
    taken: int = 0
    has_parts: bool = False
    places: bool = False


def turns_of(message: dict[str, Any], position: int, work: Build) -> list[Turn]:
    """The turn, or the pair of turns, that an object of a conversation stands for."""
    keys = message.keys()
    if keys == _USUAL_TURN and message["role"] in _PLAIN_ROLES:
        return [make_turn(message["role"], message["content"], position, work)]
    if keys == _LLAVA_TURN and message["from"] in ("human", "gpt"):
        return [make_turn(SPEAKERS[message["from"]], message["value"], position, work)]
    message = {key: value for key, value in message.items() if value is not None}
    if _SPELLING.isdisjoint(message):
        for pair in PAIRS:
            if not message.keys().isdisjoint(pair):
                return _pair(message, pair, position, work)
    trained = _is_trained(message, position, work.where, work.columns)
    _refuse_unread(message, _SPELLING, position, work)
    role, content = _speaker(message, position, work.where)
    if role != "assistant" and trained:
        raise bad_row(
            f"turn {position}: only answers are trained on, and it asks to train on the {role}'s words", work.where, _UNMASK
        )
    turn = make_turn(role, content, position, work)
    return [turn._replace(trained=False) if role == "assistant" and trained is False else turn]


_UNMASK = "set it to false, or to 0"


def _pair(message: dict[str, Any], pair: tuple[str, str], position: int, work: Build) -> list[Turn]:
    """A question and its answer in one object, as nanoVLM, the_cauldron and FineVision (and xtuner) have them."""
    asked, answered = pair
    trained = _is_trained(message, position, work.where, work.columns) is not False
    _refuse_unread(message, frozenset({*pair, "system"}), position, work)
    work.places = True
    turns = []
    if not is_empty(message.get("system")):
        if position:
            raise bad_row(f"turn {position}: has 'system', which stands first or nowhere", work.where)
        turns.append(make_turn("system", message["system"], position, work))
    turns.append(make_turn("user", message.get(asked), position, work))
    return [*turns, make_turn("assistant", message.get(answered), position, work)._replace(trained=trained)]


def _speaker(message: dict[str, Any], position: int, where: str) -> tuple[str, Any]:
    """Role and content in either spelling."""
    spoken, written = "from" in message or "value" in message, "role" in message or "content" in message
    if spoken and written:
        raise bad_row(f"turn {position}: both role/content and from/value", where)
    role, content, roles = (
        (message.get("from"), message.get("value"), SPEAKERS) if spoken else (message.get("role"), message.get("content"), ROLES)
    )
    if not isinstance(role, str) or role not in roles:
        raise bad_row(f"turn {position}: role is {role!r:.100}, expected one of {', '.join(roles)}", where)
    return roles[role], content


def _is_trained(message: dict[str, Any], position: int, where: str, columns: Columns) -> bool | None:
    """What a turn says of its training; None where it says nothing. Raises for half a weight, and for a contradiction."""
    said = set()
    for key in MASKS.keys() & message.keys():
        value = message[key]
        if columns.ignores(key):
            continue
        if isinstance(value, str | list | dict) or value not in (0, 1):
            remedy = "an answer is trained on in full or not at all: set it to 0 or 1, or name it in columns.ignore"
            raise bad_row(f"turn {position}: {key} {value!r:.60}", where, remedy)
        said.add(bool(value) == MASKS[key])
    if len(said) > 1:
        raise bad_row(f"turn {position}: {', '.join(sorted(MASKS.keys() & message.keys()))} contradict each other", where)
    return said.pop() if said else None


def _refuse_unread(message: dict[str, Any], read: frozenset[str], position: int, work: Build) -> None:
    for key in message:
        if key in read or key in MASKS or is_harmless(key) or work.columns.ignores(key) or is_blank(message[key]):
            continue
        raise not_read(key, work.where, f"turn {position}: ")


def make_turn(role: str, content: Any, position: int, work: Build) -> Turn:
    """A turn from its content, text or parts; pictures are taken as it shows them."""
    if isinstance(content, list):
        work.has_parts = True
        parts = join_texts([piece for part in content for piece in _part(part, role, position, work)])
    elif isinstance(content, str):
        parts = (content,)
        if role == "user":
            parts = _question_parts(content, work)
    else:
        raise bad_row(f"turn {position}: content is {type(content).__name__}, expected text", work.where)
    said = content if isinstance(content, str) else "".join([part for part in parts if isinstance(part, str)])
    if is_half_surrogate(said):
        raise bad_row(f"turn {position}: content is not UTF-8 or has half a surrogate pair", work.where)
    if role == "assistant" and (not said or said.isspace()):
        raise bad_row(f"turn {position}: the answer is empty", work.where)
    return Turn(role, parts if role == "user" else (said,))


def _question_parts(text: str, work: Build) -> tuple[str | ImageSlot, ...]:
    if "<img>" in text and not work.given and _QWEN_IMAGE.search(text):
        return _named_in_text(text, work)
    parts, slots = split_placeholders(text, len(work.shown))
    for _ in range(slots - len(work.shown)):
        take(work)
    return parts


def _named_in_text(text: str, work: Build) -> tuple[str | ImageSlot, ...]:
    """Qwen-VL names a picture where it stands: `Picture 1: <img>a.jpg</img>`."""
    parts: list[str | ImageSlot] = []
    for number, piece in enumerate(_QWEN_IMAGE.split(text)):
        if number % 2:
            work.shown += listed([piece.strip()], work.where)
            parts.append(ImageSlot(len(work.shown) - 1))
        elif piece:
            parts += _question_parts(piece, work)
    return tuple(parts)


def take(work: Build) -> ImageSlot:
    """A slot for the next of the row's pictures; too many are counted, and told when the row ends."""
    if work.taken < len(work.given):
        work.shown.append(work.given[work.taken])
    else:
        work.shown.append(None)
    work.taken += 1
    return ImageSlot(len(work.shown) - 1)


def _part(part: Any, role: str, position: int, work: Build) -> list[str | ImageSlot]:
    """One part of a content list, as OpenAI, the Hugging Face chat templates and Qwen-VL write them."""
    where = work.where
    if not isinstance(part, dict):
        raise bad_row(f"turn {position}: a part is {type(part).__name__}, expected an object", where)
    part = {key: value for key, value in part.items() if value is not None}
    _refuse_unread_in_part(part, position, work)
    kind = part.get("type", "text" if "text" in part and "image" not in part else "image" if "image" in part else None)
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise bad_row(f"turn {position}: a text part without text", where)
        return [part["text"]] if part["text"] else []
    if kind not in ("image", "image_url", "input_image"):
        raise bad_row(f"turn {position}: a part of type {kind!r:.100}, expected text, image or image_url", where)
    if role != "user":
        raise bad_row(f"turn {position}: only a user shows pictures", where)
    return [_picture(part, position, work)]


def _refuse_unread_in_part(part: dict[str, Any], position: int, work: Build) -> None:
    if part.get("type", "text") not in _KNOWN_PARTS:
        return  # refused for that
    for key, value in part.items():
        known = key in _PART_KEYS or key in _HARMLESS_IN_PART or work.columns.ignores(key)
        if not known and not is_blank(value):
            raise not_read(key, work.where, f"turn {position}: a part ")


_KNOWN_PARTS = ("text", "input_text", "output_text", "image", "image_url", "input_image")


def _picture(part: dict[str, Any], position: int, work: Build) -> ImageSlot:
    sources = [part[key] for key in ("image_url", "image", "url", "path") if key in part]
    if len(sources) > 1:
        raise bad_row(f"turn {position}: an image part with {len(sources)} sources", work.where)
    if not is_empty(part.get("text")):
        raise bad_row(f"turn {position}: an image part with a text", work.where, "make it two parts")
    if not sources:
        if part.get("index", work.taken) != work.taken:  # TRL's numbers the row's pictures
            raise bad_row(f"turn {position}: shows picture {part['index']!r:.60}, picture {work.taken} is next", work.where)
        return take(work)
    source = sources[0]
    if isinstance(source, dict) and "url" in source:
        source = source["url"]
    work.shown.append(listed([source], work.where)[0])
    return ImageSlot(len(work.shown) - 1)


def join_texts(pieces: list[str | ImageSlot]) -> tuple[str | ImageSlot, ...]:
    """Texts that stand beside each other as one."""
    parts: list[str | ImageSlot] = []
    for piece in pieces:
        if isinstance(piece, str) and parts and isinstance(parts[-1], str):
            parts[-1] += piece
        else:
            parts.append(piece)
    return tuple(parts)


def join_questions(turns: list[Turn]) -> list[Turn]:
    """OpenAI's own example asks in two turns, the question and its picture: one question, a line each."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and turn.role == joined[-1].role == "user":
            joined[-1] = Turn("user", join_texts([*joined[-1].parts, "\n", *turn.parts]))
        else:
            joined.append(turn)
    return joined
