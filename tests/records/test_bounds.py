"""Rows and archives that promise more than memory holds: refused by name before it is taken, whatever they are packed in."""

import io
import json
import re
import resource
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bombs import BOMBS
from faults import Png, drain, tarred

from pipeline.core.errors import PipelineError
from pipeline.records.formats import BadRow, GoodImages, SourceSpec
from pipeline.records.formats.row import MAX_ROW, MAX_VALUES
from pipeline.records.images import MAX_FILE, ImageError, ImageRoot

GOOD = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "x"}]}


@contextmanager
def memory_for(gigabytes: float) -> Iterator[None]:
    """Whoever asks for more than that in addition has a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(gigabytes * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def reasons(rows: list[Any]) -> list[str]:
    return [row.reason if isinstance(row, BadRow) else "" for row in rows]


def test_a_picture_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(3 << 30)
    with (
        zipfile.ZipFile(tmp_path / "pics.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.jpg", "w", force_zip64=True) as f,
    ):
        for _ in range(200):
            f.write(bytes(1 << 20))
    with memory_for(0.5):
        for root, name in ((tmp_path, "large.jpg"), (tmp_path / "pics.zip", "a.jpg")):
            with pytest.raises(ImageError, match=rf"{name}'?: [\d,]+ bytes, more than {MAX_FILE:,}"):
                ImageRoot(root).read(name)


def test_a_zip_that_lies_about_a_size_gives_no_more_than_it_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pics.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(50 << 20))
    data = bytearray((tmp_path / "pics.zip").read_bytes())
    at = data.rfind(b"PK\1\2") + 24
    data[at : at + 4] = struct.pack("<I", 1000)
    (tmp_path / "pics.zip").write_bytes(data)
    with memory_for(0.5), pytest.raises(ImageError, match="unreadable"):
        ImageRoot(tmp_path / "pics.zip").read("a.jpg")


def test_a_zip_of_too_many_members_is_refused_by_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "pics.zip", "w") as archive:
        for number in range(50):
            archive.writestr(f"{number}.png", b"")
    monkeypatch.setattr("pipeline.records.images.MAX_MEMBERS", 20)
    with pytest.raises(PipelineError, match="members, more than 20 -> unpack it"):
        ImageRoot(tmp_path / "pics.zip")


def test_a_line_without_an_end_and_rows_of_millions_of_values(tmp_path: Path) -> None:
    path, many = tmp_path / "rows.jsonl", '{"a": [' + "0," * (MAX_VALUES + 1) + "0]}\n"
    with path.open("w") as file:
        file.write(json.dumps(GOOD) + "\n" + many + '{"a": ' + "[" * 100_000 + "\n" + json.dumps(GOOD) + "\n")
        file.write('{"a": "' + "x" * (MAX_ROW + 10))
    with memory_for(1.0):
        found = reasons(drain(SourceSpec(str(path))))
    assert [bool(reason) for reason in found] == [False, True, True, False, True]
    assert f"more than {MAX_VALUES:,} values" in found[1]
    assert "longer than 64 MiB" in found[4]


def test_an_array_s_row_of_millions_of_values_ends_it(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[" + json.dumps(GOOD) + ', {"a": [' + "0," * (2 * MAX_VALUES) + "0]}]")
    with memory_for(1.0):
        found = reasons(drain(SourceSpec(str(tmp_path / "rows.json"))))
    assert found[0] == ""
    assert f"more than {MAX_VALUES:,} values" in found[1]


def test_a_table_s_line_of_millions_of_cells_is_a_row(tmp_path: Path) -> None:
    text = "image,text\n" + "," * (2 * MAX_VALUES + 9) + "\n" + "a.png,hello\n"
    (tmp_path / "rows.csv").write_text(text)
    with memory_for(1.0):
        found = reasons(drain(SourceSpec(str(tmp_path / "rows.csv"))))
    assert f"more than {MAX_VALUES:,} values" in found[0]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_tar_s_header_of_gigabytes_is_not_read(kind: bytes, tmp_path: Path, png: Png) -> None:
    good = tarred([("a.png", png(0)), ("a.txt", b"x")])
    header = tarfile.TarInfo("h")
    header.type, header.size = kind, 6 << 30
    path = tmp_path / "x.tar"
    body = good.rstrip(b"\0")
    body += bytes(-len(body) % 512)
    path.write_bytes(body + header.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.truncate(len(body) + 512 + (6 << 30))
    with memory_for(0.5):
        found = reasons(drain(SourceSpec(str(path))))
    assert found[0] == ""
    assert "a header of 6,442,450,944 bytes" in found[1]


def test_a_tar_s_picture_of_gigabytes_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    head = path.read_bytes()[:1024]
    large = tarfile.TarInfo("a.jpg")
    large.size = 3 << 30
    path.write_bytes(head + large.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.truncate(1024 + 512 + (3 << 30) + 1024)
    with memory_for(0.5):
        found = reasons(drain(SourceSpec(str(path))))
    assert "its .jpg has 3,221,225,472 bytes" in found[0]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_cell_of_half_a_gigabyte_is_a_row(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.records.formats.unpacking.MAX_BATCH", 1 << 20)
    cells = [bytes(100), bytes(3 << 20), bytes(100)]
    table = pa.table({"image": cells, "text": ["a", "b", "c"]})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=1, use_dictionary=False, compression="none")
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    found = reasons(drain(SourceSpec(str(path))))
    assert [bool(reason) for reason in found] == [False, True, False]
    assert "more than 1,048,576" in found[1]


NUMPY = b"\x93NUMPY\1\0v\0"
TABLES = {
    "a zip": b"PK\3\4" + bytes(50),
    "objects": NUMPY + b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 32), }".ljust(118),
    "a header of gigabytes": b"\x93NUMPY\2\0\xff\xff\xff\x7f{",
    "brackets": NUMPY + b"(" * 118,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_hashes_is_one_or_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "images.npy").write_bytes(TABLES[name])
    with memory_for(0.5), pytest.raises(PipelineError, match=r"images\.npy: cannot be read"):
        GoodImages(tmp_path / "images.npy")


def test_a_table_of_hashes_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((4, 32), np.uint8))
    data = (tmp_path / "images.npy").read_bytes().replace(b"(4, 32)", b"(9999999999, 32)")[:128]
    (tmp_path / "images.npy").write_bytes(data)
    with memory_for(0.5), pytest.raises(PipelineError, match="cannot be read"):
        GoodImages(tmp_path / "images.npy")


@pytest.mark.parametrize("kind", BOMBS)
def test_a_block_that_unpacks_to_gigabytes_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bounds that are a sixteenth of the real ones: those are fuzzed, and the memory measured."""
    monkeypatch.setattr("pipeline.records.formats.unpacking.MEMORY", 64 << 20)
    monkeypatch.setattr("pipeline.records.formats.unpacking.MAX_BATCH", 8 << 20)
    BOMBS[kind](tmp_path / kind, 4 << 20)
    with memory_for(1.0):
        found = drain(SourceSpec(str(tmp_path / kind)))
    assert found
    for row in found:
        assert isinstance(row, BadRow)
        assert re.search(
            r"rows? of [\d,]+ (bytes|values)|more than 64 MB|no values|over and over|a name of|more than differ", row.reason
        ), row


def test_more_rows_than_differ_in_a_file_are_refused_at_once(tmp_path: Path) -> None:
    """Rows of nothing take no room, and each would be listed as bad."""
    rows = 3 << 20
    table = pa.table({"text": pa.nulls(rows, pa.string()), "image": pa.nulls(rows, pa.string())})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        [bad] = drain(SourceSpec(str(tmp_path / name)))
        assert isinstance(bad, BadRow)
        assert bad.ends_file
        assert "more than differ in" in bad.reason
