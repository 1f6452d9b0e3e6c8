"""What a row may say: the keys that are read, those that are known to teach nothing, and the refusal of all others by name.

A key that nobody reads may be a mask, a system prompt or half a conversation; so every filled key is read, stands in `HARMLESS`
(whose names are those of public data sets), is named in `columns.ignore`, or makes its row a bad one. What is looked for
follows from a row's set of keys alone and is remembered, so that a row of the usual keys costs one look-up.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pipeline.core import PipelineError
from pipeline.records.formats.row import Bytes
from pipeline.records.record import bad_row

TURN_KEYS = ("messages", "conversations", "conversation", "texts")
IMAGE_KEYS = ("images", "image", "image_bytes", "image_path", "file_name")
TEXT_KEYS = ("text", "caption", "txt")
QUESTION_KEYS = ("question", "query", "instruction", "prompt")
ANSWER_KEYS = ("answer", "multiple_choice_answer", "answers", "label", "response", "output", "completion")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
INPUT_KEYS, HISTORY_KEYS = ("input",), ("history",)
USUAL_KEYS = {
    "turns": TURN_KEYS, "images": IMAGE_KEYS, "text": TEXT_KEYS, "question": QUESTION_KEYS, "answer": ANSWER_KEYS,
    "system": SYSTEM_KEYS, "input": INPUT_KEYS, "history": HISTORY_KEYS,
}  # fmt: skip
TURNS, CAPTION = frozenset({"turns"}), frozenset({"text"})
ASKED = frozenset({"question", "answer", "input", "history"})
LAYOUTS = (TURNS, ASKED, CAPTION)  # kinds of keys, of which a row has those of one
NOT_READ = {
    "tools": "tool calls are not trained: remove such rows",
    "videos": "videos are not read: remove such rows",
    "audios": "sound is not read: remove such rows",
    "chosen": "preference data: to train on `chosen` set columns.turns or columns.answer to it, and columns.ignore: [rejected]",
    "choices": "write the choices into the question, or name the column in columns.ignore",
    "weight": "weigh rows by data.*.mix; to leave an answer out set `loss: false` in its turn",
    "input_ids": "give the conversation itself: tokenize makes the ids",
}
_SAME = {
    "functions": "tools",
    "video": "videos",
    "audio": "audios",
    "rejected": "chosen",
    "options": "choices",
    "labels": "input_ids",
}
_WEIGHT = re.compile(r"(^|_)(weights?|masks?|masked|loss|trains?|trainable|training)(_|$)")
_GUARDED = re.compile(rf"{_WEIGHT.pattern}|^tool|(^|_)(input|prompt|completion|token|label|answer)_ids$")
_ROW_MASKS = ("weight", "loss", "train", "trainable", "training")  # which say nothing of a row where they are 1 or true

# Words for what a row is, where it is from and how good it was found to be; as snake case, in lower case
HARMLESS = frozenset(
    """
    __index_level_0__ __key__ __local_path__ __url__ aesthetic annotator annotators answer_type answer_types aspect_ratio
    author_id avatar_url bytes categories category checksum cls code_url collection confidence config content_type corpus
    country created created_at creation_time data_name data_source data_split dataset dataset_name date datetime difficulty
    doc_type domain domains download_date entailed equivalent error_message exif extension file_size filesize flag flags fold
    format generator genre grade groups guid has_image hash hashed_ip height height_list heights human_or_machine id ids idx
    image_classes image_format image_height image_mode image_size image_sizes image_width img_height img_width index info
    is_balanced is_test job_id keep_count key lang language language_code languages len length level licence license
    license_name line link locale md5 meta metadata mime mime_type modality mode model model_name moderation n_turns nsfw
    num_images num_tokens num_turns objectionable ocr_info ocr_tokens openai_moderation origin original_dataset
    original_height original_width page page_no page_title_id partition phash priority provenance publisher punsafe pwatermark
    quality question_tokens question_type question_types rank ranking rating ratings redacted redaction release repo
    resolution retrieved row_number safe score scores set set_name sha1 sha256 shard short_name similarity size
    skip_prompt_formatting snapshot source sources split state status step subset tag tags task task_name task_type tasks
    temperature tier time timestamp token_count tokens topic topics toxic toxicity turn_count turn_identifier type types uid
    unsafe updated updated_at uploaded url urls user_id uuid version views warc_path watermark website width width_list widths
    worker workers
    """.split()  # noqa: SIM905
)
_HARMLESS_ENDS = re.compile(
    r"(^|_)(ids?|idx|index|uid|uuid|key|md5|sha1|sha256|hash|urls?|uri|scores?|ratings?|min|confidence|similarity|probability"
    r"|timestamp|license|width|height|source|version|count|no)$"
)
# Names and addresses of a picture: nothing to learn beside the picture itself, but the picture where the row shows none
_POINTERS = re.compile(
    r"^(im(g|age)s?|photo|pic(ture)?)(_?(name|file|filename|path|paths|url|urls|uri|link|src))?s?$|^file(_?name|_?path)?$|^path$"
)
_PICTURE = re.compile(r"^data:image|\.(jpe?g|png|webp|gif|bmp|tiff?)([?#].*)?$", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
REMEMBERED = 4096  # sets of keys
_EMPTY: tuple[Any, ...] = (None, "", [], {}, b"")
_BLANK = ("", "[]", "{}", "null", "None", "nan")


def is_empty(value: Any) -> bool:
    """Whether a key says nothing: null, no text, an empty list, or the not-a-number that stands for a missing cell."""
    return value in _EMPTY or value != value


def is_blank(value: Any) -> bool:
    """As `is_empty`, and a text that spells nothing, as tables and JSON within JSON have it."""
    return is_empty(value) or (isinstance(value, str) and value.strip() in _BLANK)


def _plain(key: str) -> str:
    return _CAMEL.sub("_", str(key).strip().lstrip(".")).lower().replace("-", "_").replace(" ", "_")


def is_harmless(key: str) -> bool:
    """Whether a key of a row or a turn is known to teach nothing."""
    plain = _plain(key)
    return not _is_guarded(plain) and (plain in HARMLESS or _HARMLESS_ENDS.search(plain) is not None)


def not_read(key: str, where: str, place: str = "") -> PipelineError:
    """The error of a row that says something under a key which nobody reads."""
    plain = _plain(key)
    remedy = NOT_READ.get(_SAME.get(plain, plain)) or (NOT_READ["weight"] if _WEIGHT.search(plain) and not place else "")
    rename = "" if place else "name it in data.*.columns where it is the turns, images, text, question, answer or system; "
    return bad_row(f"{place}has {key!r:.100}, which is not read", where, remedy or f"{rename}if it says nothing, in columns.ignore")


class Look(NamedTuple):
    """Of rows with the same keys: under which each kind of part is `present`; what must be empty, to look at `closely`;
    `pointers` to pictures; whether there are keys of several layouts."""

    present: dict[str, tuple[str, ...]]
    closely: tuple[str, ...]
    pointers: tuple[str, ...]
    mixed: bool


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a row keeps its parts; "" = whichever of the usual names it has. `ignore`: keys, or patterns of them, that say
    nothing, of rows and of turns."""

    turns: str = ""
    images: str = ""
    text: str = ""
    question: str = ""
    answer: str = ""
    system: str = ""
    ignore: tuple[str, ...] = ()
    _looks: dict[tuple[str, ...], Look] = field(default_factory=dict, init=False, repr=False, compare=False)

    def usual(self, kind: str) -> tuple[str, ...]:
        """The names under which a part may stand: the one the user gave, or all usual ones."""
        named = getattr(self, kind, "")
        return (named,) if named else USUAL_KEYS[kind]

    def kind_of(self, key: str) -> str:
        """Which part of a row stands under a key, "other" for a part whose name the user gave as another, "" for none."""
        if named := next((kind for kind in USUAL_KEYS if key and getattr(self, kind, "") == key), ""):
            return named
        usual = next((kind for kind, keys in USUAL_KEYS.items() if key in keys), "")
        return "other" if usual and getattr(self, usual, "") else usual

    def ignores(self, key: str) -> bool:
        """Whether the user said that a key says nothing."""
        return bool(self.ignore) and any(fnmatchcase(key, pattern) for pattern in self.ignore)

    def is_wanted(self, name: str) -> bool:
        """Whether a column of a file is looked at: a part of a row, or what must be empty."""
        look = self._make_look((name,))
        return bool(look.closely or look.pointers or look.present.keys() - {"other"})

    def look(self, names: tuple[str, ...]) -> Look:
        """What to look at in a row with these keys."""
        found = self._looks.get(names)
        if found is None:
            if len(self._looks) >= REMEMBERED:
                self._looks.clear()
            found = self._looks[names] = self._make_look(names)
        return found

    def _make_look(self, names: tuple[str, ...]) -> Look:
        present: dict[str, tuple[str, ...]] = {}
        rest: list[str] = []
        for name in names:
            if self.ignores(name):
                continue
            if kind := self.kind_of(name):
                present[kind] = (*present.get(kind, ()), name)
            else:
                rest.append(name)
        pointers = tuple(name for name in rest if _POINTERS.match(_plain(name)))
        closely = tuple(name for name in rest if name not in pointers and not is_harmless(name))
        return Look(present, closely, pointers, sum(not layout.isdisjoint(present) for layout in LAYOUTS) > 1)

    def check(self, names: list[str], where: str) -> None:
        """Raises `PipelineError` when a file with these columns can hold no row, or has columns that nobody would read."""
        for kind in USUAL_KEYS:
            named = getattr(self, kind, "")
            if named and named not in names:
                raise PipelineError(f"no column {named!r}; it has {listing(names)}", where=where, remedy=f"set columns.{kind}")
        if not self._holds(names, "turns") and not (self._holds(names, "question", "input") and self._holds(names, "answer")):
            self._check_captions(names, where)
        unknown = [name for name in self.look(tuple(names)).closely if not _is_guarded(_plain(name))]
        if unknown:
            what = f"column {unknown[0]!r}" if len(unknown) == 1 else f"columns {listing([repr(name) for name in unknown])}"
            remedy = f"name a part of the row in columns, and what says nothing in columns.ignore: [{listing(unknown)}]"
            raise PipelineError(f"{what}, which nobody reads", where=where, remedy=remedy)

    def _holds(self, names: Iterable[str], *kinds: str) -> bool:
        return any(self.kind_of(name) in kinds for name in names)

    def _check_captions(self, names: list[str], where: str) -> None:
        for kind, what in (("text", "a caption"), ("images", "its picture")):
            if not self._holds(names, kind):
                asked = (
                    f"expected {' or '.join(TURN_KEYS[:2])}, or question and answer, or {what} in {' or '.join(self.usual(kind))}"
                )
                remedy = f"set columns.turns, or columns.question and columns.answer, or columns.{kind}"
                raise PipelineError(f"{asked}; it has {listing(names)}", where=where, remedy=remedy)


def _is_guarded(plain: str) -> bool:
    """Keys that are known to say much: columns of them, which are mostly empty, are looked at row by row."""
    return plain in NOT_READ or plain in _SAME or _GUARDED.search(plain) is not None


def refuse_unread(content: dict[str, Any], look: Look, where: str, *, shows: Callable[[], bool]) -> None:
    """Raises `PipelineError` for the first key of a row that says something and is not read; `shows`: whether it has pictures."""
    for key in look.closely:
        value = content[key]
        if not is_blank(value) and not (_plain(key) in _ROW_MASKS and value in (1, "1", "true", "True")):
            raise not_read(key, where)
    for key in look.pointers:
        values = content[key] if isinstance(content[key], list) else [content[key]]
        if any(isinstance(value, bytes | dict | Bytes) and value for value in values):
            raise not_read(key, where)
        if not shows() and any(isinstance(value, str) and _PICTURE.search(value) for value in values):
            raise bad_row(
                f"shows no picture, and {key!r:.100} names one", where, f"set columns.images: {key}, if it is a file's name"
            )


def listing(names: list[str]) -> str:
    """Names in one line, the first of them where there are many."""
    text = ", ".join(names)
    return text if len(text) < 300 else text[:300] + "…"
