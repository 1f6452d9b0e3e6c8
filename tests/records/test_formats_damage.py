"""Tables, folders, tars, Arrow and Parquet files under damage: what is lost is named and counted, the rest stays."""

import io
import os
import random
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import Png, drain, tarred, total

from pipeline.records.formats import BadRow, SourceSpec, open_source
from pipeline.records.record import Record

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
    rows = drain(SourceSpec(str(tmp_path), links="refuse"))
    bad = {str(row.row): row.reason for row in rows if isinstance(row, BadRow)}
    assert sorted(bad) == ["alone.png", "latin", "linked", "other", "torn", "two", "words"]
    assert "leads out" in bad["linked"]
    assert "elsewhere.png" in bad["other"]
    assert "two.jpg" in bad["two"]
    assert [row.turns[1].parts for row in rows if isinstance(row, Record)] == [("fine",)]


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
