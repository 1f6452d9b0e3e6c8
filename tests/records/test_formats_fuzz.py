"""Any rows, any bytes and any mutant of a file are read or refused in one line, and none is lost.

The slow tests push 20,000 fuzzed records and 5,000 mutated images through the same doors.
"""

import csv
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import (
    ANSWER,
    ASKED,
    FIXTURES,
    GOOD,
    PIXEL,
    Png,
    at_most,
    drain,
    opened_or_refused,
    plain,
    require_one_line,
    said,
    spoken,
    tarred,
    texts,
    total,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.records.decoder import decode
from pipeline.records.formats import BadRow, SourceSpec, detect
from pipeline.records.images import ImageError
from pipeline.records.record import Record


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
