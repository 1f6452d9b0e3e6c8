"""File systems that refuse what a local disk does (NFS, SMB, FUSE): the same files, one line of warning for each refusal."""

import errno
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CPU
from safetensors.torch import save_file

from pipeline.core import disk, map_array, map_arrow, map_tensors, publish, publish_folder, remove_leftovers, write_json
from pipeline.core.errors import PipelineError
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.store import mapping
from pipeline.features.store.store import FeatureStore
from pipeline.records.images import ImageRoot

CODES = [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EXDEV, errno.ENOSYS]


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_told", set())


def refusing(code: int, when: Callable[..., bool] = lambda *_: True, real: Any = None) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        if when(*given):
            raise OSError(code, os.strerror(code), *(str(path) for path in given[:1] if isinstance(path, Path)))
        return real(*given, **named)

    return call


def is_folder(handle: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{handle}")


def there(_: Any, target: Any) -> bool:
    return os.path.lexists(target)


DEEDS: dict[str, tuple[str, Callable[..., bool], str]] = {
    "folders": ("fsync", is_folder, "sync folders"),
    "files": ("fsync", lambda handle: not is_folder(handle), "sync files"),
    "modes": ("chmod", lambda *_: True, "change permissions"),
    "rename over": ("replace", there, "rename over what is there"),
    "rename at all": ("replace", lambda *_: True, "rename over what is there"),
    "room": ("posix_fallocate", lambda *_: True, "reserve room ahead"),
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("deed", DEEDS)
def test_what_is_refused_is_done_without(
    code: int, deed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, when, said = DEEDS[deed]
    monkeypatch.setattr(os, name, refusing(code, when, getattr(os, name)))
    for round_ in range(3):
        write_json(tmp_path / "a.json", {"round": round_})
        with publish_folder(tmp_path / "folder") as folder:
            (folder / "b").write_text(str(round_))
            disk.set_mode(folder / "b", 0o600)
        with publish(tmp_path / "room") as temporary, temporary.open("wb") as file:
            disk.reserve(file.fileno(), 1000, where=tmp_path / "room")
    assert (tmp_path / "a.json").read_text() == '{\n  "round": 2\n}\n'
    assert (tmp_path / "folder/b").read_text() == "2"
    assert (tmp_path / "room").stat().st_size == 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder", "room"]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if said in line] == lines
    assert len(lines) == 1
    assert re.match(rf"warning: .*: this file system does not {said} \(.*\); going on without", lines[0])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_is_no_refusal(code: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(os, name, refusing(code))
    with pytest.raises(PipelineError, match=r"a\.json: cannot be written"):
        write_json(tmp_path / "a.json", 2)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_rename_that_fails_halfway_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("file", "folder"):
        monkeypatch.undo()
        path = tmp_path / kind
        if kind == "file":
            path.write_text("old")
        else:
            path.mkdir()
            (path / "old").write_text("old")
        monkeypatch.setattr(os, "replace", refusing(errno.EPERM))
        monkeypatch.setattr("shutil.move", refusing(errno.EIO))
        with (
            pytest.raises(PipelineError, match="cannot be written"),
            publish(path) if kind == "file" else publish_folder(path) as new,
        ):
            new.touch()
        assert kind == "folder" or path.read_text() == "old"
        assert [found.name for found in tmp_path.glob(".*")] == []


def test_what_a_kill_between_two_renames_leaves_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".a.json.999999999@machine-.tmp").write_text("old")
    os.utime(tmp_path / ".a.json.999999999@machine-.tmp", (0, 0))
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    for content in ("1", "2"):
        with publish_folder(tmp_path / "models") as folder:
            (folder / "a").write_text(content)
    assert (tmp_path / "models").is_symlink()
    assert (tmp_path / "disk/a").read_text() == "2"


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EINVAL, errno.EPERM])
def test_features_are_the_same_where_nothing_can_be_linked_locked_or_mapped(
    code: int, vision_folders: dict[str, Path], png: Callable[[int], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "pics").mkdir()
    for number in range(7):
        (tmp_path / f"pics/{number}.png").write_bytes(png(number))
    files, hashes = distinct_images([(ImageRoot(tmp_path / "pics"), [f"{number}.png" for number in range(7)])])
    encoder = Encoder(str(vision_folders["clip"]), precision="float32", device=CPU, batch=4)

    def run(name: str) -> dict[str, bytes]:
        out = tmp_path / name
        extract(files, hashes, encoder, stores=[tmp_path / f"{name}-store"], out=out, shard_rows=3, workers=0)
        store = FeatureStore(out)
        rows = store.locate(hashes[::-1])
        assert np.array_equal(store.read(rows).numpy()[::-1], store.read(rows[::-1].copy()).numpy())
        assert all(not list(shard.bad_rows()) for shard in store.shards)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())} | {"rows": store.read(rows).numpy().tobytes()}

    wanted = run("plain")

    for name in ("link", "fchmod", "fsync", "posix_fallocate"):
        monkeypatch.setattr(os, name, refusing(code))
    monkeypatch.setattr(mmap, "mmap", refusing(code))
    plain = mapping._mmap
    monkeypatch.setattr(mapping, "_mmap", lambda *given: refusing(code)() if given[-1] >= 0 else plain(*given))
    assert run("refused") == wanted
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]  # a bar may stand before it
    said = {line.partition("does not ")[2].partition(" (")[0] for line in lines}
    assert said == {"sync files", "sync folders", "change permissions", "reserve room ahead", "map files into memory"}
    assert len(lines) == len(said)


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EACCES])
def test_what_is_mapped_is_read_where_nothing_can_be_mapped(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrow, array, tensors = tmp_path / "a.arrow", tmp_path / "a.npy", tmp_path / "a.safetensors"
    table = pa.table({"a": [1, 2, 3]})
    with pa.ipc.new_file(arrow, table.schema) as file:
        file.write_table(table)
    np.save(array, np.arange(5))
    save_file({"a": torch.arange(7)}, tensors)
    monkeypatch.setattr(pa, "memory_map", refusing(code))
    monkeypatch.setattr(mmap, "mmap", refusing(code))
    monkeypatch.setattr("safetensors.torch.load_file", refusing(code))
    assert pa.ipc.open_file(map_arrow(arrow)).read_all() == table
    assert map_array(array).tolist() == [0, 1, 2, 3, 4]
    assert map_tensors(tensors)["a"].tolist() == list(range(7))
    assert len(capsys.readouterr().err.splitlines()) == 1
    for read in (map_arrow, map_array, map_tensors):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "look.png").mkdir()
    (tmp_path / "look.png/dear.txt").write_text("kept")
    with (
        pytest.raises(PipelineError, match=r"look\.png: cannot be written: Is a directory"),
        publish(tmp_path / "look.png") as made,
    ):
        made.write_text("new")
    assert (tmp_path / "look.png/dear.txt").read_text() == "kept"
    assert [found.name for found in tmp_path.iterdir()] == ["look.png"]
