"""A shard with a valid seal and strange contents: HDF5 is told to read nothing but plain numbers from this file."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.core.errors import PipelineError
from pipeline.features.store.row_format import Float16Format
from pipeline.features.store.shards import SEAL, Shard, _digest, write_shard

SPEC = {"tokens": 4, "width": 8}
HASHES = np.random.default_rng(0).integers(0, 256, (3, 32), dtype=np.uint8)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    rows = np.random.default_rng(1).normal(size=(3, 4, 8)).astype(np.float16)
    write_shard(tmp_path / "shard.h5", HASHES, SPEC, Float16Format(4, 8), [rows])
    return tmp_path / "shard.h5"


def sealed_again(path: Path, change: Callable[[h5py.File], object]) -> None:
    """As an attacker would: change the file and give it a seal that fits."""
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    with h5py.File(path, "r+", locking=False) as file:
        change(file)
    _, offset, size = struct.unpack("<8sQQ", data[-40:-16])
    place = struct.pack("<8sQQ", SEAL, offset, size)
    digest = _digest(path, place)
    with path.open("ab") as file:
        file.write(place + digest)


def instead(name: str, make: Callable[[h5py.File], object]) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        del file[name]
        make(file)

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3,), "<u8")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (3,))
    file.create_virtual_dataset("row_xxh3", layout)


STRANGE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "nothing strange": (lambda file: file.attrs.__setitem__("zz", 1), ""),
    "another dataset": (lambda file: file.create_dataset("x", (3,), "f4"), "which no shard has|things"),
    "many": (lambda file: [file.create_group(str(i)) for i in range(50)], "holds 53 things"),
    "a group": (instead("row_xxh3", lambda file: file.create_group("row_xxh3")), "no dataset"),
    "a soft link": (instead("row_xxh3", lambda file: file.__setitem__("row_xxh3", h5py.SoftLink("/features"))), "is a link"),
    "a link to itself": (instead("row_xxh3", lambda file: file.__setitem__("row_xxh3", h5py.SoftLink("/row_xxh3"))), "is a link"),
    "another file": (instead("row_xxh3", lambda f: f.__setitem__("row_xxh3", h5py.ExternalLink("/etc/x.h5", "/"))), "is a link"),
    "a virtual dataset": (instead("row_xxh3", virtual), "elsewhere"),
    "another file's bytes": (
        instead("row_xxh3", lambda f: f.create_dataset("row_xxh3", (3,), "<u8", external=[("/etc/hostname", 0, 24)])), "elsewhere"),
    "gzip": (instead("row_xxh3", lambda f: f.create_dataset("row_xxh3", (10**8,), "<u8", compression=1)), "packed or in pieces"),
    "chunks": (instead("row_xxh3", lambda f: f.create_dataset("row_xxh3", (3,), "<u8", chunks=(1,))), "packed or in pieces"),
    "an endless shape": (instead("row_xxh3", lambda f: f.create_dataset("row_xxh3", (10**12,), "<u8")), "the file"),
    "texts": (instead("row_xxh3", lambda f: f.create_dataset("row_xxh3", (3,), h5py.string_dtype())), "expected numbers"),
    "a missing table": (lambda file: file.__delitem__("row_xxh3"), "not a readable shard"),
    "a table of another length": (instead("row_xxh3", lambda f: f.create_dataset("row_xxh3", (4,), "<u8")), "the file"),
    "padding": (lambda file: file.attrs.__setitem__("pad", np.zeros(60_000, np.uint8)), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_shard_is_refused_by_name(name: str, shard: Path) -> None:
    change, said = STRANGE[name]
    sealed_again(shard, change)
    if not said:
        assert len(Shard(shard)) == 3
        return
    with pytest.raises(PipelineError, match=said) as caught:
        Shard(shard)
    assert caught.value.where == str(shard)


def test_what_lies_around_the_rows_is_bounded(shard: Path) -> None:
    shard.chmod(0o644)
    seal = shard.read_bytes()[-40:]
    with shard.open("r+b") as file:
        file.truncate(5 << 30)
        file.seek(0, os.SEEK_END)
        file.write(seal)
    with pytest.raises(PipelineError, match="more around its rows than its tables need"):
        Shard(shard)
