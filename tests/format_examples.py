"""Rows and pictures for tests of formats, and what a reader makes of them."""

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.records.formats import BadRow, SourceSpec, open_source
from pipeline.records.record import ImageSlot, Record, Turn

Png = Callable[[int], bytes]

Seen = tuple[tuple[Turn, ...], list[bytes]]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def seen(spec: SourceSpec | list[SourceSpec]) -> list[Seen]:
    """Every row's turns with the bytes of its pictures, through the public interface."""
    source = open_source(spec)
    rows = list(source.records())
    assert not [row.line() for row in rows if isinstance(row, BadRow)]
    return [(row.turns, [source.images.read(name) for name in row.images]) for row in rows if isinstance(row, Record)]


def talk(*said: Any) -> tuple[Turn, ...]:
    """Turns in order, the user first; a picture's number stands for its slot."""
    turns = []
    for i, parts in enumerate(said):
        parts = parts if isinstance(parts, tuple) else (parts,)
        turns.append(Turn(("user", "assistant")[i % 2], tuple(ImageSlot(p) if isinstance(p, int) else p for p in parts)))
    return tuple(turns)


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def pack(path: Path, members: list[tuple[str, bytes]], *, kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def saved(folder: Path, png: Png) -> Path:
    datasets = pytest.importorskip("datasets")
    said = [[{"role": "user", "content": f"<image>{i}"}, {"role": "assistant", "content": "yes"}] for i in range(5)]
    pictures = [{"bytes": png(i), "path": None} for i in range(5)]
    built = datasets.Dataset.from_dict({"messages": said, "image": pictures}).cast_column("image", datasets.Image())
    built.save_to_disk(str(folder), num_shards=2)
    return folder


def image_folder(parent: Path, png: Png) -> Path:
    """Three pictures, one of them in a folder of its own."""
    folder = parent / "images"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (folder / name).write_bytes(png(number))
    return folder
