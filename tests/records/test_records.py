"""What a row becomes: both spellings give one record, slots are numbered through the turns, lines are named as editors count.

Every kind of bad row is in test_formats_faults.py and test_formats_damage.py, for every container that can hold it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import read_records

from pipeline.core.errors import PipelineError
from pipeline.records.formats.conversation import Reading, turns_and_pictures
from pipeline.records.record import ImageSlot, Record, Turn, check_order, load_json, split_placeholders

USER, ASSISTANT = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}
SEEN = {"role": "user", "content": "<image>\nWhat?"}


def made(row: dict[str, Any]) -> tuple[tuple[Turn, ...], list[Any]]:
    return turns_and_pictures(row, Reading(), where="f:1")


def test_both_spellings_give_the_same_record() -> None:
    turns = [{"role": "user", "content": "<image><image>What?"}, ASSISTANT]
    ours = made({"messages": turns, "images": ["a.jpg", "b/c.jpg"]})
    theirs = made({"conversations": turns, "image": "a.jpg, b/c.jpg"})
    assert ours == theirs
    assert ours == ((Turn("user", (ImageSlot(0), ImageSlot(1), "What?")), Turn("assistant", ("This.",))), ["a.jpg", "b/c.jpg"])


def test_images_are_numbered_through_all_turns_of_the_user() -> None:
    row = {"messages": [{"role": "user", "content": "a<image>b<image>"}, ASSISTANT, SEEN, ASSISTANT], "images": ["0", "1", "2"]}
    turns, _ = made(row)
    assert turns[0].parts == ("a", ImageSlot(0), "b", ImageSlot(1))
    assert turns[2].parts == (ImageSlot(2), "\nWhat?")


@pytest.mark.parametrize("key", ["images", "image"])
@pytest.mark.parametrize("empty", [[], "", None])
def test_a_row_without_images_is_a_row(key: str, empty: Any) -> None:
    assert made({"messages": [USER, ASSISTANT], key: empty})[1] == []


def test_only_a_user_shows_pictures() -> None:
    said = [{"role": "system", "content": "<image> is a word"}, SEEN, {"role": "assistant", "content": "An <image>."}]
    turns, _ = made({"messages": said, "images": ["a"]})
    assert [turn.parts for turn in turns] == [("<image> is a word",), (ImageSlot(0), "\nWhat?"), ("An <image>.",)]


@pytest.mark.parametrize("role", ["a\nb\u2028c", ["user"], None, "human", 3])
def test_a_role_of_no_kind_is_one_line_that_names_the_turn(role: Any) -> None:
    with pytest.raises(PipelineError, match="turn 1: role is") as caught:
        made({"messages": [USER, {"role": role, "content": "x"}]})
    assert len(caught.value.line().splitlines()) == 1


def test_records_come_in_order_with_their_lines_and_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"messages": [{"role": "user", "content": str(i)}, ASSISTANT]}).encode() for i in range(4)]
    path.write_bytes(b"\xef\xbb\xbf" + rows[0] + b"\r\n\n  \n" + rows[1] + b"\n" + rows[2] + b"\n" + rows[3])
    found = list(read_records(path))
    assert [(record.where, record.turns[0].parts) for record in found] == [
        (f"{path}:{line}", (str(i),)) for i, line in enumerate((1, 4, 5, 6))
    ]
    assert all(isinstance(record, Record) for record in found)
    assert list(read_records(path, limit=2)) == found[:2]
    assert list(read_records(path, limit=9)) == found


def test_the_limit_spares_the_rows_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"messages": [USER, ASSISTANT]}).encode() + b"\nbroken\n")
    assert len(list(read_records(path, limit=1))) == 1


def test_parts_of_a_text_put_together_are_the_text() -> None:
    for text in ("", "<image>", "a<image>", "<image><image>b", "<image", "a<image>b<image>c"):
        parts, after = split_placeholders(text, 5)
        assert "".join("<image>" if isinstance(part, ImageSlot) else part for part in parts) == text
        assert [part.index for part in parts if isinstance(part, ImageSlot)] == list(range(5, after))


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["assistant", "user"], "expected user and assistant in turn"),
        (["user", "user", "assistant"], "expected user and assistant in turn"),
        (["user", "assistant", "system"], "expected user and assistant in turn"),
        (["system"], "turns are system"),
        (["user", "assistant", "user"], "last turn is the user's"),
    ],
)
def test_turns_alternate_and_end_on_the_assistant(roles: list[str], said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        check_order(roles, "f:1")
    check_order(["system", "user", "assistant"], "f:1")


def test_a_key_that_stands_twice_is_no_json() -> None:
    assert load_json('{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="twice"):
        load_json('{"a": 1, "a": 2}')
