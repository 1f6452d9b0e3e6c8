"""A folder's `checksums.json`: whatever happens to a file, it is named; nothing that did not happen is complained of."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.core.checksums import CHECKSUMS, record, seal, sign, to_json, unseal, verify
from pipeline.core.errors import ARTEFACT, PipelineError
from pipeline.core.files import publish_folder

FILES = {"a.bin": bytes(range(256)) * 40, "b.json": b'{"x": 1}\n', "empty": b"", "inner/c.txt": "ä".encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with publish_folder(tmp_path / "f") as temporary:
        (temporary / "inner").mkdir()
        for name, data in FILES.items():
            (temporary / name).write_bytes(data)
    return tmp_path / "f"


def problem(folder: Path) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        verify(folder, remedy="make it")
    assert caught.value.code == ARTEFACT
    assert len(caught.value.line().splitlines()) == 1
    return caught.value


def test_a_folder_as_it_was_written_passes_wherever_it_lies_and_whatever_its_dates(folder: Path, tmp_path: Path) -> None:
    assert verify(folder, remedy="").keys() == FILES.keys()
    again = shutil.copytree(folder, tmp_path / "elsewhere")
    for path in again.rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert verify(again, remedy="") == verify(folder, remedy="")


def test_equal_folders_have_equal_checksums(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / CHECKSUMS).unlink()
    sign(other)
    assert (other / CHECKSUMS).read_bytes() == (folder / CHECKSUMS).read_bytes()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


FOREIGN = to_json(seal({"files": {"../f/a.bin": {}}}))

DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "one bit": ("a.bin", flip, "its bytes are not those that were written -> make it"),
    "cut off": ("a.bin", lambda path: os.truncate(path, 100), "has 100 bytes, 10,240 were written -> make it"),
    "longer": ("empty", lambda path: path.write_bytes(b"x"), "has 1 bytes, 0 were written"),
    "missing": ("inner/c.txt", Path.unlink, "is missing -> make it"),
    "a folder in its place": ("b.json", lambda path: (path.unlink(), path.mkdir()), "b.json"),
    "one more": ("new.bin", lambda path: path.write_bytes(b"x"), "is not one of the files that were written here -> remove it"),
    "one more within": ("inner/d", lambda path: path.write_bytes(b""), "is not one of the files that were written here"),
    "checksums gone": (CHECKSUMS, Path.unlink, "is missing"),
    "checksums flipped": (CHECKSUMS, flip, "cannot be used: "),
    "checksums empty": (CHECKSUMS, lambda path: path.write_bytes(b""), "cannot be used: "),
    "checksums a list": (CHECKSUMS, lambda path: path.write_text("[1]"), "lacks its own checksum"),
    "checksums deep": (CHECKSUMS, lambda path: path.write_text("[" * 100_000), "nested too deep"),
    "another's checksums": (
        CHECKSUMS,
        lambda path: path.write_text(to_json(seal({"files": {"../f/a.bin": {}}}))),
        "cannot be used",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_happened_to_a_file_is_said_of_that_file(folder: Path, kind: str) -> None:
    name, damage, expected = DAMAGE[kind]
    damage(folder / name)
    found = problem(folder)
    assert found.where == str(folder / name)
    assert expected in found.line()


def test_of_several_the_same_is_named_every_time(folder: Path) -> None:
    for name in ("inner/c.txt", "b.json", "a.bin"):
        (folder / name).unlink()
    assert {problem(folder).where for _ in range(20)} == {str(folder / "a.bin")}


def test_by_products_of_browsers_and_git_are_no_files_of_a_folder(folder: Path) -> None:
    (folder / ".git").mkdir()
    for name in (".git/config", ".DS_Store", "inner/Thumbs.db"):
        (folder / name).write_text("x")
    verify(folder, remedy="")


def test_only_what_is_wanted_is_read(folder: Path) -> None:
    flip(folder / "a.bin")
    assert verify(folder, remedy="", wanted=lambda name: name == "b.json").keys() == {"b.json"}
    (folder / "extra").write_text("x")
    with pytest.raises(PipelineError, match=r"a\.bin"):
        verify(folder, remedy="", alone=False)


def test_files_recorded_one_by_one_are_a_signed_folder(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).write_text(name)
        record(tmp_path / name)
    one_by_one = (tmp_path / CHECKSUMS).read_bytes()
    (tmp_path / CHECKSUMS).unlink()
    sign(tmp_path)
    assert (tmp_path / CHECKSUMS).read_bytes() == one_by_one
    (tmp_path / "x").write_text("another")
    record(tmp_path / "x")
    verify(tmp_path, remedy="")


def test_every_bit_of_sealed_json_counts() -> None:
    text = to_json(seal({"shards": [{"file": "a.h5", "rows": 10}]})).encode()
    assert unseal(text.decode()) == {"shards": [{"file": "a.h5", "rows": 10}]}
    for bit in range(8 * len(text)):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            unseal(changed.decode())
    for end in range(len(text)):
        with pytest.raises(ValueError):
            unseal(text[:end].decode())


def test_large_files_are_read_in_pieces_and_every_piece_counts(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3_000_001)
    for name in ("one", "two", "three", "four", "five"):
        (tmp_path / name).write_bytes(data)
    sign(tmp_path)
    for place in (0, 1 << 18, (1 << 18) - 1, 2_999_999, 3_000_000):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "four").write_bytes(changed)
        assert problem(tmp_path).where == str(tmp_path / "four")
    (tmp_path / "four").write_bytes(data)
    verify(tmp_path, remedy="")


def test_a_folder_that_cannot_be_listed_is_not_signed_as_an_empty_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error", str(path))

    (folder / "checksums.json").unlink()
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sign(folder)
    assert not (folder / "checksums.json").exists()
