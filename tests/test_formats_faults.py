"""Formats under damage: every fault is one line that names file and row, its neighbours stay, and rows in = rows out.

The slow tests push 20,000 fuzzed records and 5,000 mutated images through the same doors.
"""

import base64
import csv
import io
import json
import os
import random
import resource
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.formats import BadRow, Columns, SourceSpec, detect, open_source
from pipeline.images import ImageError, decode
from pipeline.records import ImageSlot, Record

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
    "an answer without weight": ({"messages": [ASKED, {**ANSWER, "weight": 0}]}, "weight 0"),
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
    "a table without captions": (b"a,b\n1,2\n", "expected messages or conversations, or a caption"),
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


TABLES: dict[str, tuple[bytes, list[str]]] = {
    "a cell too many": (b"a,one,more\nb,two\n", ["bad:2", "two"]),
    "a cell too few": (b"a\nb,two\n", ["bad:2", "two"]),
    "a stray quote": (b'a,"one" more\nb,two\n', ["bad:2", "two"]),
    "a quote that never ends": (b'a,one\nb,"two\nc,three\n', ["one", "bad:3"]),
    "not UTF-8": (b"a,\xe9t\xe9\nb,two\n", ["bad:2", "two"]),
    "no picture": (b",one\nb,two\n", ["bad:2", "two"]),
    "no caption": (b"a,\nb,two\n", ["bad:2", "two"]),
    "a cell that is too long": (b"a," + b"x" * 200_000 + b"\nb,two\n", ["bad:2", "two"]),
    "line ends of Windows": (b"a,one\r\n\r\nb,two\r\n", ["one", "two"]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_bad_row_of_a_table_is_named_and_its_neighbours_stay(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "table"
    path.write_bytes(b"image,text\n" + TABLES[kind][0])
    rows = drain(SourceSpec(str(path)))
    assert [f"bad:{row.row}" if isinstance(row, BadRow) else row.turns[1].parts[0] for row in rows] == TABLES[kind][1]


def test_a_line_longer_than_memory_should_hold_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "array", "table"):
        monkeypatch.setattr(f"pipeline.formats.{module}.MAX_ROW", 1000)
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


def test_a_folder_s_faults_are_named_by_file(tmp_path: Path, png: Png) -> None:
    for name in ("alone.png", "two.png", "two.jpg", "torn.png", "other.png", "linked.png"):
        (tmp_path / name).write_bytes(png(0))
    other = '{"text": "x", "image": "elsewhere.png"}'
    for name, text in (("two.txt", "x"), ("torn.json", "{"), ("words.txt", "x"), ("other.json", other)):
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.png").write_bytes(png(0))
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path.parent / f"{tmp_path.name}-secret").write_text("secret")
    (tmp_path / "linked.txt").symlink_to(tmp_path.parent / f"{tmp_path.name}-secret")
    (tmp_path / "fine.png").write_bytes(png(0))
    (tmp_path / "fine.txt").write_text("fine")
    rows = drain(SourceSpec(str(tmp_path)))
    bad = {str(row.row): row.reason for row in rows if isinstance(row, BadRow)}
    assert sorted(bad) == ["alone.png", "latin", "linked", "other", "torn", "two", "words"]
    assert "outside" in bad["linked"]
    assert "elsewhere.png" in bad["other"]
    assert "two.jpg" in bad["two"]
    assert [row.turns[1].parts for row in rows if isinstance(row, Record)] == [("fine",)]


def tarred(members: list[tuple[str, bytes]], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def test_a_tar_s_faults_are_named_by_sample(tmp_path: Path, png: Png) -> None:
    members = [("good.png", png(0)), ("good.txt", b"x"), ("twice.png", png(0)), ("twice.png", png(1)), ("twice.txt", b"x"),
               ("silent.png", png(0)), ("torn.json", b"{"), ("empty.png", b""), ("empty.txt", b"x"), ("plain", b"x"),
               ("latin.png", png(0)), ("latin.txt", b"\xe9"), ("last.png", png(0)), ("last.txt", b"y")]  # fmt: skip
    (tmp_path / "x").write_bytes(tarred(members))
    rows = drain(SourceSpec(str(tmp_path / "x")), read=True)
    assert [row.row if isinstance(row, BadRow) else "-" for row in rows] == [
        "-", "twice", "silent", "torn", "empty", "plain", "latin", "-"]  # fmt: skip


@pytest.mark.parametrize("keep", [512, 700, 1024, 3000, -10240, -10241])
def test_a_cut_tar_says_that_rows_are_missing(tmp_path: Path, png: Png, keep: int) -> None:
    members = [part for i in range(20) for part in ((f"{i}.png", png(i)), (f"{i}.txt", b"x"))]
    data = tarred(members)
    end = 20 * (512 + -(-len(png(0)) // 512) * 512 + 1024)
    (tmp_path / "x").write_bytes(data[: end + 10240 + keep if keep < 0 else keep])
    *_, last = drain(SourceSpec(str(tmp_path / "x")))
    assert isinstance(last, BadRow)
    assert last.ends_file


def test_a_cut_arrow_stream_says_that_rows_are_missing(tmp_path: Path) -> None:
    """Cut between two messages it reads as a shorter stream, and no reader complains."""
    table = pa.table({"image": [f"{i}.png" for i in range(50)], "text": ["x"] * 50})
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    (tmp_path / "whole").write_bytes(file.getvalue())
    assert total(drain(SourceSpec(str(tmp_path / "whole")))) == 50
    mapped = pa.memory_map(str(tmp_path / "whole"))
    reader = pa.ipc.open_stream(mapped)
    reader.read_next_batch()
    (tmp_path / "cut").write_bytes(file.getvalue()[: mapped.tell()])
    (bad,) = drain(SourceSpec(str(tmp_path / "cut")))
    assert isinstance(bad, BadRow)
    assert bad.ends_file


def test_one_cell_that_is_not_utf8_costs_its_own_row_only(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 3, 5, 10], np.int32))
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"one\xff\xfethree"))
    table = pa.table({"image": ["a", "b", "c"], "text": texts})
    pq.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("x.parquet", "x.arrow"):
        rows = drain(SourceSpec(str(tmp_path / name)))
        assert [row.row if isinstance(row, BadRow) else row.turns[1].parts[0] for row in rows] == ["one", 1, "three"]


def test_a_damaged_row_group_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    chance = random.Random(3)
    texts = ["".join(chance.choices("abcdefgh", k=3000)) for _ in range(100)]
    table = pa.table({"image": [f"{i}.png" for i in range(100)], "text": texts})
    pq.write_table(table, tmp_path / "x", row_group_size=40, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray((tmp_path / "x").read_bytes())
    place = data.find(sorted(texts[40:80])[20].encode())  # neither the least nor the greatest: those stand in statistics too
    data[place] ^= 1
    (tmp_path / "x").write_bytes(data)
    rows = drain(SourceSpec(str(tmp_path / "x")))
    found = [row.turns[1].parts[0] for row in rows if isinstance(row, Record)]
    assert total(rows) == 100
    assert found[:40] == texts[:40]
    assert found[-20:] == texts[-20:]
    assert set(found) <= set(texts)
    (bad,) = (row for row in rows if isinstance(row, BadRow))
    assert not bad.ends_file


def test_many_files_need_few_open_at_once(tmp_path: Path, png: Png) -> None:
    for i in range(150):
        pq.write_table(pa.table({"image": [png(i)], "text": [str(i)]}), tmp_path / f"{i:03d}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, before[1]))
    try:
        rows = drain(SourceSpec(f"{tmp_path}/*"), read=True)
        source = open_source(SourceSpec(f"{tmp_path}/*"))
        read = [source.images.read(name) for row in rows if isinstance(row, Record) for name in row.images]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert read == [png(i) for i in range(150)]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, moved, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 10))):
        place = chance.randrange(len(changed)) if changed else 0
        match chance.randrange(5):
            case 0 if changed:
                changed[place] ^= 1 << chance.randrange(8)
            case 1 if changed:
                changed[place] = chance.randrange(256)
            case 2:
                changed[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(4)))
            case 3:
                del changed[place : place + chance.randrange(8)]
            case _ if chance.random() < 0.2:
                del changed[place:]
    return bytes(changed)


def whole_files(folder: Path, png: Png) -> dict[str, bytes]:
    """A small sound file of each kind, pictures within where it can hold them."""
    table = pa.table({"image": [png(i) for i in range(6)], "messages": [json.dumps(GOOD["messages"])] * 6})
    captions = pa.table(
        {"image": [{"bytes": png(i), "path": "x"} for i in range(6)], "caption": [f"caption {i}" for i in range(6)]}
    )
    pq.write_table(table, folder / "parquet", row_group_size=4)
    with pa.ipc.new_file(folder / "arrow", captions.schema) as file:
        file.write_table(captions, max_chunksize=4)
    with pa.ipc.new_stream(folder / "stream", table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    rows = [{**GOOD, "images": [f"data:image/png;base64,{PIXEL}"]}, GOOD, spoken(("human", "x"), ("gpt", "y"))]
    (folder / "lines").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "array").write_text(json.dumps(rows, indent=1))
    (folder / "table").write_text('image,text\na.png,"one, two"\nb.png,three\nc.png,four\n')
    members = [part for i in range(4) for part in ((f"{i}.png", png(i)[:600]), (f"{i}.txt", b"x"))]
    (folder / "tar").write_bytes(tarred(members))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def survive(folder: Path, data: bytes, kind: str, seed: int, count: int) -> tuple[int, int, int]:
    """Mutants through the reader in a process of their own: a crash of a C library is a failure here, not our end.

    Returns how many were read, refused, and had a row that was not as before.
    """
    into, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            chance, path = random.Random(seed), folder / f"mutant-{kind}"
            read = refused = bad = 0
            for _ in range(count):
                path.write_bytes(mutate(data, chance))
                with at_most(10):
                    rows = opened_or_refused(SourceSpec(str(path)), read=True)
                refused += rows is None
                read += rows is not None
                bad += any(isinstance(row, BadRow) for row in rows or [])
            os.write(out, f"{read} {refused} {bad}".encode())
        except BaseException as error:
            os.write(out, f"{kind}: {type(error).__name__}: {error}".encode()[:2000])
        finally:
            os._exit(0)
    os.close(out)
    _, status = os.waitpid(child, 0)
    with os.fdopen(into) as pipe:
        message = pipe.read()
    assert status == 0, f"{kind}: the reader's process died of signal {status & 127}"
    assert message.replace(" ", "").isdigit(), message
    read, refused, bad = map(int, message.split())
    return read, refused, bad


KINDS = ["array", "arrow", "lines", "parquet", "stream", "table", "tar"]


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(tmp_path: Path, png: Png, kind: str) -> None:
    files = tmp_path / "files"
    files.mkdir()
    read, refused, bad = survive(tmp_path, whole_files(files, png)[kind], kind, seed=1, count=60)
    assert read + refused == 60
    assert refused + bad > 10, "or the mutants are too tame"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
texts = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["<image>", "<image><image>x", "\ud800", "", "http://x/y", "data:;base64,"]
)
parts = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image", "image_url"]) | json_values,
        "text": texts,
        "image": texts | json_values,
        "image_url": st.fixed_dictionaries({"url": texts}) | json_values,
    },
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": texts | st.lists(parts, max_size=3) | json_values}
) | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": texts | json_values})
talks = st.lists(messages, max_size=4) | st.builds(
    lambda asked: [turn for text in asked for turn in ({"role": "user", "content": text}, ANSWER)],
    st.lists(texts | st.lists(parts, max_size=2), min_size=1, max_size=3),
)
nearly_rows = st.fixed_dictionaries(
    {}, optional={"messages": talks | json_values, "conversations": talks | st.builds(json.dumps, talks) | json_values,
                  "images": st.lists(texts, max_size=3) | json_values, "image": texts | json_values,
                  "caption": texts | json_values, "text": texts | json_values, "video": json_values}
)  # fmt: skip


@FIXTURES
@given(rows=st.lists(nearly_rows | json_values, max_size=4))
def test_any_rows_in_are_records_or_bad_rows_as_lines_and_as_an_array(tmp_path: Path, rows: list[Any]) -> None:
    lines, array = tmp_path / "lines", tmp_path / "array"
    lines.write_text("\n".join(json.dumps(row) for row in [GOOD, *rows, GOOD]))
    array.write_text(json.dumps([GOOD, *rows, GOOD]))
    as_lines, as_array = drain(SourceSpec(str(lines)), read=True), drain(SourceSpec(str(array)), read=True)
    assert len(as_lines) == len(as_array) == len(rows) + 2
    for one, other in zip(as_lines, as_array, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Record) and isinstance(other, Record):
            assert one.turns == other.turns


@FIXTURES
@given(rows=st.lists(st.binary(max_size=40).filter(lambda row: row.strip() and b"\n" not in row), max_size=4))
def test_any_lines_of_bytes_are_records_or_bad_rows(tmp_path: Path, rows: list[bytes]) -> None:
    (tmp_path / "lines").write_bytes(b"\n".join([json.dumps(GOOD).encode(), *rows]))
    assert total(drain(SourceSpec(str(tmp_path / "lines"), format="jsonl"))) == len(rows) + 1


plain = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@FIXTURES
@given(captions=st.lists(plain, min_size=1, max_size=6))
def test_every_format_gives_every_caption_back_as_it_was(tmp_path: Path, captions: list[str]) -> None:
    """Rows in = records, in order, letter by letter, whatever the container."""
    rows = [{"image": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    (tmp_path / "lines").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    (tmp_path / "array").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", newline="")
    with (tmp_path / "table").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "text"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet")
    with pa.ipc.new_stream(tmp_path / "stream", pa.Table.from_pylist(rows).schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows))
    members = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)]
    (tmp_path / "tar").write_bytes(tarred(members))
    for kind in ("lines", "array", "table", "parquet", "stream", "tar"):
        found = drain(SourceSpec(str(tmp_path / kind)))
        assert [row.turns[1].parts[0] if isinstance(row, Record) else row.line() for row in found] == captions, kind


@FIXTURES
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_file_is_detected_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "anything"
    path.write_bytes(content)
    opened_or_refused(SourceSpec(str(path)), read=True)
    try:
        detect(str(path))
    except PipelineError as error:
        require_one_line(error)


@pytest.mark.slow
def test_twenty_thousand_fuzzed_records_are_used_or_listed(tmp_path: Path) -> None:
    """Rows of every spelling, mutated as text: none is lost, none raises, and what reads unchanged is unchanged."""
    chance = random.Random(5)
    models: list[dict[str, Any]] = [
        GOOD,
        spoken(("human", "<image>\nWhat?"), ("gpt", "This.")) | {"image": "a.png"},
        {"image": "a.png", "caption": "x"},
        said([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}, {"type": "text", "text": "é"}]),
        {"conversations": json.dumps([ASKED, ANSWER]), "image": "a.png"},
        spoken(("system", "s"), ("human", "x"), ("gpt", "y")),
    ]
    expected: list[Any] = []
    with (tmp_path / "fuzzed").open("wb") as file:
        for number in range(20_000):
            sound = json.dumps(models[number % len(models)], ensure_ascii=False).encode()
            line = mutate(sound, chance).replace(b"\n", b" ") if chance.random() < 0.8 else sound
            if not line.strip():
                line = b"{}"
            expected.append(number % len(models) if line == sound else None)
            file.write(line + b"\n")
    (tmp_path / "sound").write_text("\n".join(json.dumps(model) for model in models))
    turns = [row.turns for row in drain(SourceSpec(str(tmp_path / "sound"))) if isinstance(row, Record)]
    with at_most(120):
        rows = drain(SourceSpec(str(tmp_path / "fuzzed"), format="jsonl"), read=False)
    assert len(rows) == 20_000
    bad = sum(isinstance(row, BadRow) for row in rows)
    assert 2000 < bad < 18_000, "some of each, or the fuzz is too tame or too wild"
    for row, model in zip(rows, expected, strict=True):
        if model is not None:
            assert isinstance(row, Record)
            assert row.turns == turns[model]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutants_of_every_kind_of_file_are_read_or_refused(tmp_path: Path, png: Png, kind: str) -> None:
    files = tmp_path / "files"
    files.mkdir()
    read, refused, _ = survive(tmp_path, whole_files(files, png)[kind], kind, seed=2, count=1000)
    assert read + refused == 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_five_thousand_mutated_images_give_a_picture_or_an_image_error(png: Png) -> None:
    chance, refused = random.Random(7), 0
    with Image.open(io.BytesIO(png(0))) as noise:
        sources = []
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
            file = io.BytesIO()
            noise.save(file, kind)
            sources.append(file.getvalue())
    for number in range(5000):
        with at_most(10):
            try:
                assert decode(mutate(sources[number % len(sources)], chance), where="f:1").mode == "RGB"
            except ImageError as error:
                refused += error.line().startswith("f:1: ")
                require_one_line(error)
    assert 500 < refused < 4500, "some of each, or the mutants are too tame or too wild"
