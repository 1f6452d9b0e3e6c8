"""Records: both spellings, every kind of bad row as one line that names file and line, nothing but records or errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.records import ImageSlot, Record, Turn, parse, read_records

USER, ASSISTANT = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}
SEEN = {"role": "user", "content": "<image>\nWhat?"}


def encoded(row: Any) -> bytes:
    return json.dumps(row).encode()


def test_both_spellings_give_the_same_record() -> None:
    turns = [{"role": "user", "content": "<image><image>What?"}, ASSISTANT]
    ours = parse(encoded({"messages": turns, "images": ["a.jpg", "b/c.jpg"]}), where="f:1")
    theirs = parse(encoded({"conversations": turns, "image": "a.jpg, b/c.jpg"}), where="f:1")
    assert ours == theirs
    assert ours == Record(
        "f:1",
        ("a.jpg", "b/c.jpg"),
        (Turn("user", (ImageSlot(0), ImageSlot(1), "What?")), Turn("assistant", ("This.",))),
    )


def test_images_are_numbered_through_all_turns_of_the_user() -> None:
    row = {"messages": [{"role": "user", "content": "a<image>b<image>"}, ASSISTANT, SEEN, ASSISTANT], "images": ["0", "1", "2"]}
    turns = parse(encoded(row), where="f:1").turns
    assert turns[0].parts == ("a", ImageSlot(0), "b", ImageSlot(1))
    assert turns[2].parts == (ImageSlot(2), "\nWhat?")


@pytest.mark.parametrize("key", ["images", "image"])
@pytest.mark.parametrize("empty", [[], ""])
def test_a_row_without_images_is_a_row(key: str, empty: Any) -> None:
    assert parse(encoded({"messages": [USER, ASSISTANT], key: empty}), where="f:1").images == ()


def test_only_a_user_shows_pictures() -> None:
    turns = [{"role": "system", "content": "<image> is a word"}, SEEN, {"role": "assistant", "content": "An <image>."}]
    record = parse(encoded({"messages": turns, "images": ["a"]}), where="f:1")
    assert [turn.parts for turn in record.turns] == [("<image> is a word",), (ImageSlot(0), "\nWhat?"), ("An <image>.",)]


TALK = [SEEN, ASSISTANT]
BAD: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"messages": [', "JSON"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "JSON"),
    "nested too deep": (b"[" * 100_000, "JSON"),
    "a key twice": (b'{"messages": [], "messages": []}', "twice"),
    "a list": (b"[1, 2]", "list"),
    "null": (b"null", "NoneType"),
    "a number of many digits": (b"1" * 5000, "JSON"),
    "no turns": (encoded({"images": []}), "messages"),
    "an empty list of turns": (encoded({"messages": []}), "messages"),
    "turns as text": (encoded({"messages": "hello"}), "messages"),
    "fewer placeholders than images": (encoded({"messages": TALK, "images": ["a", "b"]}), "1 <image> placeholders for 2 images"),
    "more placeholders than images": (encoded({"messages": TALK, "images": []}), "1 <image> placeholders for 0 images"),
    "images as a number": (encoded({"messages": TALK, "images": 3}), "images"),
    "images null": (encoded({"messages": TALK, "images": None}), "images"),
    "an image without a name": (encoded({"messages": TALK, "images": [""]}), "images"),
    "a comma too many": (encoded({"messages": TALK, "image": "a.jpg,"}), "images"),
    "a turn as text": (encoded({"messages": ["What?", ASSISTANT]}), "turn 0"),
    "an unknown role": (encoded({"messages": [{"role": "human", "content": "What?"}, ASSISTANT]}), "turn 0: role is 'human'"),
    "a role of many lines": (encoded({"messages": [{"role": "a\nb\u2028c", "content": ""}, ASSISTANT]}), "turn 0"),
    "no role": (encoded({"messages": [{"content": "What?"}, ASSISTANT]}), "turn 0"),
    "a list as role": (encoded({"messages": [{"role": ["user"], "content": "What?"}, ASSISTANT]}), "turn 0"),
    "no content": (encoded({"messages": [USER, {"role": "assistant"}]}), "turn 1: content is NoneType"),
    "a list as content": (encoded({"messages": [{"role": "user", "content": [{"text": "What?"}]}, ASSISTANT]}), "turn 0"),
    "half a surrogate in a text": (encoded({"messages": [{"role": "user", "content": "\ud800"}, ASSISTANT]}), "surrogate"),
    "half a surrogate in a name": (encoded({"messages": TALK, "images": ["\udc80.png"]}), "images"),
    "an empty answer": (encoded({"messages": [USER, {"role": "assistant", "content": " \n"}]}), "turn 1: the answer is empty"),
    "the assistant first": (encoded({"messages": [ASSISTANT, USER]}), "turns are assistant, user"),
    "two users": (encoded({"messages": [USER, USER, ASSISTANT]}), "turns are user, user"),
    "the system last": (encoded({"messages": [USER, ASSISTANT, {"role": "system", "content": "x"}]}), "turns are"),
    "the system alone": (encoded({"messages": [{"role": "system", "content": "x"}]}), "turns are system"),
    "no answer": (encoded({"messages": [USER, ASSISTANT, USER]}), "last turn is the user's"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_one_line_that_names_file_line_and_field(tmp_path: Path, kind: str) -> None:
    row, said = BAD[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encoded({"messages": [USER, ASSISTANT]}) + b"\n\n" + row + b"\n")
    with pytest.raises(PipelineError) as caught:
        list(read_records(path))
    line = caught.value.line()
    assert line.startswith(f"{path}:3: ")
    assert said in line
    assert len(line.splitlines()) == 1


def test_records_come_in_order_with_their_lines_and_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [encoded({"messages": [{"role": "user", "content": str(i)}, ASSISTANT]}) for i in range(4)]
    path.write_bytes(b"\xef\xbb\xbf" + rows[0] + b"\r\n\n  \n" + rows[1] + b"\n" + rows[2] + b"\n" + rows[3])
    found = list(read_records(path))
    assert [(record.where, record.turns[0].parts) for record in found] == [
        (f"{path}:{line}", (str(i),)) for i, line in enumerate((1, 4, 5, 6))
    ]
    assert list(read_records(path, limit=2)) == found[:2]
    assert list(read_records(path, limit=9)) == found


def test_the_limit_spares_the_rows_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encoded({"messages": [USER, ASSISTANT]}) + b"\nbroken\n")
    assert len(list(read_records(path, limit=1))) == 1


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_a_file_without_rows_is_an_error_that_names_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PipelineError, match="no such file" if content is None else "no rows") as caught:
        list(read_records(path))
    assert str(path) in caught.value.line()


def require_record_or_error(line: bytes) -> None:
    said = ""
    try:
        record = parse(line, where="f:1")
    except PipelineError as error:
        said = error.line()
    if said:
        assert said.startswith("f:1: ")
        assert len(said.splitlines()) == 1
        return
    slots = [part.index for turn in record.turns for part in turn.parts if isinstance(part, ImageSlot)]
    assert slots == list(range(len(record.images)))
    assert record.turns[-1].role == "assistant"
    for text in (*record.images, *(part for turn in record.turns for part in turn.parts if isinstance(part, str))):
        text.encode("utf-8")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
texts = st.text(st.characters(), max_size=8) | st.sampled_from(["<image>", "<image><image>x", "\ud800", ""])
messages = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | anything, "content": texts | anything})
nearly = st.dictionaries(
    st.sampled_from(["messages", "conversations", "images", "image", "id"]),
    st.lists(messages, max_size=3) | st.lists(texts, max_size=3) | texts | anything,
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_record_or_an_error(line: bytes) -> None:
    require_record_or_error(line)


@settings(max_examples=300, deadline=None)
@given(anything | nearly)
def test_any_json_gives_a_record_or_an_error(row: Any) -> None:
    require_record_or_error(encoded(row))


@settings(max_examples=200, deadline=None)
@given(names=st.lists(texts, max_size=3), asked=st.lists(texts, min_size=1, max_size=3))
def test_any_conversation_gives_a_record_or_an_error(names: list[str], asked: list[str]) -> None:
    turns = [turn for text in asked for turn in ({"role": "user", "content": text}, ASSISTANT)]
    require_record_or_error(encoded({"messages": turns, "images": names}))
