"""Bad rows of JSON lines and arrays, and files that are no data set: each is one line, and a bad row's neighbours stay."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from faults import ANSWER, ASKED, GOOD, PIXEL, drain, said, spoken

from pipeline.core.errors import PipelineError
from pipeline.records.formats import BadRow, Columns, SourceSpec, open_source
from pipeline.records.formats.detect import expand
from pipeline.records.record import Record

IMAGE_URL: dict[str, Any] = {"type": "image_url", "image_url": {"url": "https://example.org/cheese.jpg"}}

BAD: dict[str, tuple[Any, str]] = {
    "broken JSON": (b'{"messages": [', "not a JSON object"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "not UTF-8"),
    "nested too deep": (b"[" * 100_000, "not a JSON object"),
    "a key twice": (b'{"messages": [], "messages": []}', "twice"),
    "a number of 5,000 digits": (b'{"text": "x", "image": "a", "n": ' + b"1" * 5000 + b"}", "not a JSON object"),
    "a list": (b"[1, 2]", "list"),
    "NaN as a caption": (b'{"image": "a", "caption": NaN}', "float"),
    "null as a caption": ({"image": "a", "caption": None}, "no messages"),
    "nothing known": ({"id": 1}, "no messages or conversations"),
    "no turns": ({"messages": []}, "a list of turns"),
    "turns in both places": ({"messages": [ASKED, ANSWER], "conversations": [ASKED, ANSWER]}, "which one counts"),
    "images in both places": ({**GOOD, "image": "b.png"}, "which one counts"),
    "captions in both places": ({"image": "a", "caption": "x", "text": "y"}, "which one counts"),
    "a conversation of broken JSON text": ({"conversations": "[{]"}, "the conversation is not JSON"),
    "a conversation of JSON text that is no list": ({"conversations": "3"}, "a list of turns"),
    "more placeholders than images": (said("<image><image>") | {"images": ["a"]}, "2 <image> placeholders for 1 images"),
    "fewer placeholders than images": ({**GOOD, "images": ["a", "b"]}, "1 <image> placeholders for 2 images"),
    "an image without a placeholder": (said("What?") | {"image": "a.png"}, "0 <image> placeholders for 1 images"),
    "a comma too many": ({**GOOD, "images": None, "image": "a.jpg,"}, "image 1 has no name"),
    "an image as a number": ({**GOOD, "images": [3]}, "image 0 is int"),
    "an image as null": ({**GOOD, "images": [None]}, "image 0 is NoneType"),
    "an http address": ({**GOOD, "images": ["http://example.org/a.png"]}, "http address -> download"),
    "an https address in a part": (said([IMAGE_URL]), "https address -> download"),
    "a file address": ({**GOOD, "images": ["file:///etc/passwd"]}, "file address"),
    "an s3 address": ({**GOOD, "images": ["s3://bucket/a.png"]}, "s3 address"),
    "a data URL that is not base64": ({**GOOD, "images": ["data:image/png,abc"]}, "without ;base64"),
    "a data URL of broken base64": ({**GOOD, "images": ["data:image/png;base64,a$b"]}, "broken base64"),
    "an empty data URL": ({**GOOD, "images": ["data:image/png;base64,"]}, "image 0 is empty"),
    "bare base64 for a name": ({**GOOD, "images": [PIXEL * 1000]}, "a name of 8,000 letters -> give base64 as a data URL"),
    "half a surrogate in a name": ({**GOOD, "images": ["\udc80.png"]}, "half a surrogate"),
    "half a surrogate in a text": (said("\ud800"), "half a surrogate"),
    "a role of no kind": ({"messages": [{"role": "bot", "content": "x"}, ANSWER]}, "turn 0: role is 'bot'"),
    "a speaker of no kind": (spoken(("Human", "x"), ("gpt", "y")), "turn 0: role is 'Human'"),
    "a tool's turn": ({"messages": [ASKED, ANSWER, {"role": "tool", "content": "x"}]}, "turn 2: role is 'tool'"),
    "a turn in both spellings": ({"messages": [{"from": "human", "value": "x", "role": "user"}, ANSWER]}, "both role/content"),
    "a turn as text": ({"messages": ["hello", ANSWER]}, "turn 0: expected an object"),
    "tool calls": ({"messages": [said("x")["messages"][0], {**ANSWER, "tool_calls": [{"id": 1}]}]}, "has 'tool_calls'"),
    "thoughts of their own": ({"messages": [ASKED, {**ANSWER, "reasoning_content": "hm"}]}, "has 'reasoning_content'"),
    "an only answer of weight 0": ({**GOOD, "messages": [ASKED, {**ANSWER, "weight": 0}]}, "nothing to learn"),
    "a video": ({**GOOD, "video": "a.mp4"}, "'video', which is not read"),
    "content as a number": (said(3), "turn 0: content is int"),
    "content as an object": (said({"text": "x"}), "turn 0: content is dict"),
    "a part as text": (said(["x"]), "a part is str"),
    "a part of no kind": (said([{"type": "video", "video": "x"}]), "a part of type 'video'"),
    "a text part without text": (said([{"type": "text"}]), "a text part without text"),
    "an image part with two sources": (said([{"type": "image", "image": "a", "path": "b"}]), "2 sources"),
    "an image part without a source or an image": (said([{"type": "image"}]), "1 <image> placeholders for 0 images"),
    "an assistant that shows a picture": ({"messages": [said("x")["messages"][0], {"role": "assistant", "content": [
        {"type": "image", "image": "a"}]}]}, "only a user shows pictures"),
    "an empty answer": (spoken(("human", "x"), ("gpt", " \n")), "the answer is empty"),
    "an empty caption": ({"image": "a", "caption": " "}, "the answer is empty"),
    "a caption without an image": ({"caption": "x"}, "without an image"),
    "a caption with two images": ({"images": ["a", "b"], "caption": "x"}, "1 <image> placeholders for 2 images"),
    "the assistant first": (spoken(("gpt", "x"), ("human", "y")), "expected user and assistant in turn"),
    "two users": (spoken(("human", "x"), ("human", "y"), ("gpt", "z")), "expected user and assistant in turn"),
    "the system last": (spoken(("human", "x"), ("gpt", "z"), ("system", "y")), "expected user and assistant in turn"),
    "no answer": (spoken(("human", "x"), ("gpt", "z"), ("human", "y")), "the last turn is the user's"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_its_neighbours_stay(tmp_path: Path, kind: str) -> None:
    row, reason = BAD[kind]
    path, good = tmp_path / "rows.jsonl", json.dumps(GOOD).encode()
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    first, bad, last = drain(SourceSpec(str(path)))
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(bad, BadRow)
    assert bad.line().startswith(f"{path}:3: ")
    assert reason in bad.line()


LOST_WITH_THE_REST = {"broken JSON", "nested too deep"}  # of these an array cannot tell where they end


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_of_an_array_is_named_and_its_neighbours_stay(tmp_path: Path, kind: str) -> None:
    row, reason = BAD[kind]
    path, good = tmp_path / "rows.json", json.dumps(GOOD).encode()
    text = row if isinstance(row, bytes) else json.dumps(row).encode()
    path.write_bytes(b"[" + good + b",\n" + text + b",\n" + good + b"]")
    rows = drain(SourceSpec(str(path)))
    assert isinstance(rows[0], Record)
    assert isinstance(rows[1], BadRow)
    assert rows[1].line().startswith(f"{path}:1: ")
    if kind in LOST_WITH_THE_REST:
        assert rows[1].ends_file
        assert len(rows) == 2
    else:
        assert isinstance(rows[2], Record)
        assert reason.replace("not a JSON object", "") in rows[1].line()


REFUSED: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "no rows"),
    "spaces": (b" \n\n ", "no rows"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-16"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "compressed (gzip)"),
    "a zip": (b"PK\x03\x04" + bytes(30), "compressed (zip)"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(30), "not a known format"),
    "HTML": (b"<!DOCTYPE html>\n<html></html>", "not a known format"),
    "one object over several lines": (json.dumps({"annotations": [1, 2]}, indent=2).encode(), "over several lines"),
    "a row over several lines": (json.dumps(GOOD["messages"][0] | {"x": [ASKED]}, indent=1).encode(), "over several lines"),
    "a table without captions": (b"a,b\n1,2\n", "expected messages or conversations, or question and answer, or a caption"),
    "a table without pictures": (b"text,b\n1,2\n", "its picture in images"),
    "a column twice": (b"image,text,text\n", "twice"),
    "half a Parquet file": (b"PAR1" + bytes(100), "not a readable Parquet file"),
    "half an Arrow file": (b"ARROW1\0\0" + bytes(100), "not a readable Arrow file"),
    "half an Arrow stream": (b"\xff\xff\xff\xff" + bytes(100), "not a readable Arrow file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_data_set_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    content, reason = REFUSED[kind]
    path = tmp_path / "rows.parquet"  # a name says nothing
    path.write_bytes(content)
    with pytest.raises(PipelineError) as caught:
        open_source(SourceSpec(str(path)))
    line = caught.value.line()
    assert line.startswith(str(path))
    assert reason in line
    assert len(line.splitlines()) == 1


def test_mistakes_in_what_is_asked_for_are_told_at_once(tmp_path: Path) -> None:
    good = tmp_path / "rows.jsonl"
    good.write_text(json.dumps(GOOD))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    (tmp_path / "saved" / "train").mkdir()
    table = tmp_path / "table.csv"
    table.write_text("image,text\n")
    asked: list[tuple[SourceSpec, str]] = [
        (SourceSpec(str(tmp_path / "missing")), "no such file"),
        (SourceSpec(f"{tmp_path}/*.nothing"), "no file matches"),
        (SourceSpec(()), "an empty list"),
        (SourceSpec((str(good), str(good))), "stands twice"),
        (SourceSpec(str(good), format="jsnol"), "no format 'jsnol'"),
        (SourceSpec(str(good), format="folder"), "its format is set to folder"),
        (SourceSpec(str(tmp_path), format="jsonl"), "its format is set to jsonl"),
        (SourceSpec(str(good), format="parquet"), "not a readable Parquet file"),
        (SourceSpec(str(good), str(tmp_path / "nowhere")), "no such folder or zip"),
        (SourceSpec(str(tmp_path / "saved")), "a saved DatasetDict"),
        (SourceSpec(str(table), columns=Columns(text="captoin")), "no column 'captoin'; it has image, text"),
        (SourceSpec(str(good), weight=float("nan")), "weight nan"),
    ]
    for spec, reason in asked:
        with pytest.raises(PipelineError, match=reason) as caught:
            open_source([spec])
        assert len(caught.value.line().splitlines()) == 1


def test_a_line_longer_than_memory_should_hold_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "array", "table"):
        monkeypatch.setattr(f"pipeline.records.formats.{module}.MAX_ROW", 1000)
    long, good = {"text": "x" * (3 << 20), "image": "a"}, {"text": "y", "image": "a"}
    (tmp_path / "lines").write_text("\n".join(json.dumps(row) for row in (good, long, good)))
    (tmp_path / "array").write_text(json.dumps([good, {"text": "x" * (9 << 20)}, good]))
    (tmp_path / "table").write_text("image,text\na,y\na," + "x" * 5000 + "\na,y\n")
    assert [isinstance(row, Record) for row in drain(SourceSpec(str(tmp_path / "lines")))] == [True, False, True]
    first, bad = drain(SourceSpec(str(tmp_path / "array")))
    assert isinstance(first, Record)
    assert isinstance(bad, BadRow)
    assert bad.ends_file
    assert [isinstance(row, Record) for row in drain(SourceSpec(str(tmp_path / "table")))] == [True, False, True]


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9, 0.99])
def test_a_cut_array_gives_its_first_rows_and_says_that_more_are_lost(tmp_path: Path, cut: float) -> None:
    path, text = tmp_path / "rows.json", json.dumps([GOOD] * 20)
    path.write_text(text[: int(len(text) * cut)])
    *good, last = drain(SourceSpec(str(path)))
    assert len(good) == int(20 * cut)
    assert all(isinstance(row, Record) for row in good)
    assert isinstance(last, BadRow)
    assert last.ends_file


def test_text_behind_an_array_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([GOOD]) + "\n" + json.dumps([GOOD]))
    good, bad = drain(SourceSpec(str(tmp_path / "rows.json")))
    assert isinstance(good, Record)
    assert isinstance(bad, BadRow)
    assert "text behind the array" in bad.reason


def test_a_folder_that_cannot_be_listed_is_not_passed_over_by_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    listed = os.scandir

    def fail(path: str) -> Any:
        if str(path).endswith("in"):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(PipelineError, match="in: cannot be listed: Permission denied"):
        expand(f"{tmp_path}/**/*.jsonl")
