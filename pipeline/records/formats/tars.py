"""WebDataset tars: members that stand together and share a name up to its first dot are one sample.

Read in order without unpacking; a sample's key is its offset in the tar, so that its picture can be read at random later.
`KEY.jpg` (or png, webp, ...) is its picture, `KEY.0.jpg`, `KEY.1.jpg` are several; `KEY.json` is a row, `KEY.txt` a caption.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipeline.core import PipelineError, brief
from pipeline.records.formats.folder import sidecar_content
from pipeline.records.formats.lines import parse_object
from pipeline.records.formats.row import MAX_ROW, UNREAD, BadRow, Row
from pipeline.records.images import MAX_FILE, ImageError

TEXTS = ("txt", "caption", "text")
_PICTURE = re.compile(r"(?:(\d{1,6})\.)?(jpg|jpeg|png|webp|gif|bmp|tif|tiff)", re.IGNORECASE)
_BLOCK = 512
_LONGEST_HEADER, _HEADERS = 1 << 20, 8


@dataclass(slots=True)
class _Sample:
    key: str
    offset: int
    members: list[tuple[str, int, int]] = field(default_factory=list)  # extension, offset of its data, size
    problem: str = ""


class Tar:
    """One uncompressed tar."""

    def __init__(self, file: str) -> None:
        self.file = file

    def names(self) -> None:
        """Samples have members of their own."""

    def rows(self) -> Iterator[Row | BadRow]:
        with open(self.file, "rb") as file:
            for sample in _samples(file, 0):
                if isinstance(sample, str):
                    yield BadRow(self.file, "end", sample, "fetch the tar again: what follows cannot be read", ends_file=True)
                    return
                try:
                    if sample.problem:
                        raise PipelineError(sample.problem)
                    yield Row(self.file, sample.key, _content(file, sample, read=False), sample.offset)
                except (PipelineError, OSError, ValueError) as error:
                    yield BadRow(self.file, sample.key, error.what if isinstance(error, PipelineError) else brief(error))

    def content(self, key: int) -> dict[str, Any]:
        where = f"{self.file}: byte {key}"
        try:
            with open(self.file, "rb") as file:
                sample = next(iter(_samples(file, key)), "")
                if isinstance(sample, str) or sample.problem:
                    raise ImageError("no sample begins here any more", where=where, remedy="run the stage again")
                return _content(file, sample, read=True)
        except (OSError, ValueError) as error:
            raise ImageError(f"unreadable: {brief(error)}", where=where) from None


def _samples(file: BinaryIO, offset: int) -> Iterator[_Sample | str]:
    """Samples from a place in the tar on; a text instead says why it cannot be read further."""
    current: _Sample | None = None
    for member in _members(file, offset):
        if isinstance(member, str):
            if current:
                yield current
            yield member
            return
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if member.isdir() or (base.startswith("__") and base.endswith("__")):  # WebDataset keeps such names for itself
            continue
        key = f"{folder}/{stem}" if folder else stem
        if current is None or key != current.key:
            if current:
                yield current
            current = _Sample(key, member.offset)
        if not member.isreg() or member.issparse():
            current.problem = f"{member.name!r:.200} is a link or no plain file"
        elif not dot or not extension:
            current.problem = f"{member.name!r:.200} has no extension, by which its part would be known"
        elif any(extension == known for known, _, _ in current.members):
            current.problem = f"{member.name!r:.200} stands twice"
        current.members.append((extension, member.offset_data, member.size))
    if current:
        yield current


def _members(file: BinaryIO, offset: int) -> Iterator[tarfile.TarInfo | str]:
    """Members in order, none kept; a text at a place where the tar is damaged or cut."""
    size, end = os.fstat(file.fileno()).st_size, offset
    try:
        file.seek(offset)
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` is the caller's
        while True:
            if problem := _long_header(file, archive.offset):
                yield problem
                return
            if (member := archive.next()) is None:
                break
            vars(archive)["members"].clear()  # else every member of a tar of millions is kept
            if member.offset < end or archive.offset <= member.offset or member.size < 0:
                yield f"a header at byte {member.offset:,} that leads backwards"
                return
            end = archive.offset
            if end > size:
                yield f"cut in the middle of {member.name!r:.200}"
                return
            yield member
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        yield f"damaged behind byte {end:,}: {brief(error)}"
        return
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        yield f"cut or damaged at byte {end:,}: the blocks that close a tar are missing"


def _long_header(file: BinaryIO, offset: int) -> str:
    """What is wrong with the headers in front of the next member: the library reads them whole, however long they say they are."""
    for _ in range(_HEADERS):
        file.seek(offset)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK or block[156:157] not in (b"x", b"g", b"X", b"L", b"K"):
            return ""
        size = tarfile.nti(block[124:136])  # type: ignore[attr-defined]
        if not 0 <= size <= _LONGEST_HEADER:
            return f"a header of {size:,} bytes at byte {offset:,}, more than {_LONGEST_HEADER:,}"
        offset += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return f"more than {_HEADERS} headers in front of the member at byte {offset:,}"


def _content(file: BinaryIO, sample: _Sample, *, read: bool) -> dict[str, Any]:
    """What a sample says; its pictures' bytes only when asked for."""
    pictures: list[tuple[int, Any]] = []
    texts: dict[str, str] = {}
    others: dict[str, Any] = {}
    row = None
    for extension, offset, size in sample.members:
        found = _PICTURE.fullmatch(extension)
        if found and size > MAX_FILE:
            raise PipelineError(f"its .{extension} has {size:,} bytes, more than {MAX_FILE:,}")
        if found:
            picture = (_bytes(file, offset, size) if read else UNREAD) if size else b""
            pictures.append((int(found[1]) if found[1] else -1, picture))
        elif extension in (*TEXTS, "json"):
            if size > MAX_ROW:
                raise PipelineError(f"its .{extension} is longer than {MAX_ROW >> 20} MiB")
            text = _bytes(file, offset, size).decode("utf-8-sig")
            if extension == "json":
                row = parse_object(text, where="")
            else:
                texts[extension] = text.strip("\r\n")
        else:
            others[f".{extension}"] = UNREAD if size else b""
    if len(texts) > 1:
        raise PipelineError(f"has {', '.join(texts)}: which one counts?")
    if row is None and not texts:
        raise PipelineError("neither .json nor .txt: nothing to learn")
    content = sidecar_content(next(iter(texts.values()), None), row) | others
    if pictures:
        pictures.sort(key=lambda picture: picture[0])
        content = {**content, "image": None, "images": [picture for _, picture in pictures]}
    return content


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
