"""Image files: where they lie, a folder or a zip, and their bytes. What becomes of those says `decoder`.

Everywhere downstream an image is the SHA-256 of its file's bytes, so the same picture under two names is one image.
"""

import hashlib
import json
import os
import stat
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.core import BAD_ROWS, PipelineError, brief

MAX_FILE = 192 << 20  # bytes of one image file, also within an archive or a row: uncompressed, 67 million pixels
MAX_MEMBERS = 4_000_000  # of a zip, whose list is held in memory


class ImageError(PipelineError):
    """One image cannot be used: missing, outside its root, or not decodable."""

    def __init__(self, what: str, *, where: str, remedy: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy or "mend or remove the image or the row", code=BAD_ROWS)


class Images(Protocol):
    """Where a data set's pictures are: their bytes by name. Pickles, and may be read by several threads."""

    @property
    def path(self) -> object:
        """What messages call it."""
        ...

    def place(self, name: str) -> str:
        """What messages call one image."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of one image file; raises `ImageError` naming it."""
        ...


class ImageRoot:
    """Reads image files by name from a folder or a zip (as LLaVA's pretraining images come); names cannot leave it.

    Links below a folder are the user's own and are followed, wherever they lead: to DVC's cache, to another disk. A name
    cannot use one to climb: its `..` are resolved before any link is, and none may lead above the root.

    Args:
        follow: False for data of strangers: a link that leads out of the folder is an `ImageError`.

    Cheap to pickle and safe in forked workers and threads: a zip is opened anew in each process.
    """

    def __init__(self, path: str | Path, *, follow: bool = True) -> None:
        self.path, self._follow = Path(path), follow
        if not self.path.exists():
            raise PipelineError("no such folder or zip", where=str(path), remedy="set data.*.images")
        self._is_zip = self.path.is_file()
        if self._is_zip:
            _check_zip(self.path)
        self._root = os.path.realpath(self.path)
        self._archive: zipfile.ZipFile | None = None
        self._owner, self._lock = -1, threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "follow": self._follow}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], follow=state["follow"])  # type: ignore[misc]

    def place(self, name: str) -> str:
        """What messages call one image."""
        return f"{self.path}: {name!r}"

    def read(self, name: str) -> bytes:
        """The bytes of one image file; raises `ImageError` naming it."""
        return self._read_member(name) if self._is_zip else self._read_file(name)

    def _read_member(self, name: str) -> bytes:
        where = self.place(name)
        with self._lock:  # a ZipFile keeps one file position
            try:
                if self._archive is None or self._owner != os.getpid():
                    self._archive, self._owner = zipfile.ZipFile(self.path), os.getpid()
                if (size := self._archive.getinfo(name).file_size) > MAX_FILE:  # no more than that is unpacked, whatever is in it
                    raise ImageError(f"{size:,} bytes, more than {MAX_FILE:,}", where=where)
                return self._archive.read(name)
            except KeyError:
                raise ImageError("no such image in the zip", where=where, remedy=_if_several(name)) from None
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError) as error:
                raise ImageError(f"unreadable: {brief(error)}", where=where) from None

    def _read_file(self, name: str) -> bytes:
        where = self.place(name)
        if "\0" in name or "://" in name:
            raise ImageError("not a file name", where=where)
        inside = self._inside(name)
        if inside is None:
            raise ImageError("lies outside the image root", where=where)
        path = os.path.join(self._root, inside)
        if not self._follow and leads_out(path, self._root):
            raise ImageError("a link that leads out of the image root", where=where, remedy=FORBIDDEN)
        return read_file(path, where=where, missing=_if_several(name))

    def _inside(self, name: str) -> str | None:
        """The name as a path below the root, without `..`; None where it would leave it."""
        if os.path.isabs(name):
            roots = (os.path.abspath(self.path), self._root)
            name = next((os.path.relpath(name, root) for root in roots if os.path.normpath(name).startswith(root + os.sep)), "..")
        inside = os.path.normpath(name)
        return None if inside == ".." or inside.startswith(".." + os.sep) else inside


FORBIDDEN = "put the file there itself, or, where the data are your own, set data.*.links to follow"


def _if_several(name: str) -> str:
    """What mends a name that looks like several; "" where it does not."""
    parts = [part.strip() for part in name.replace(";", ",").split(",")]
    if len(parts) < 2 or not all(os.path.splitext(part)[1] for part in parts):
        return ""
    return f'several pictures are a list, in JSON lines: {{"images": {json.dumps(parts[:2], ensure_ascii=False)}, ...}}'


def leads_out(path: str, root: str) -> bool:
    """Whether a link on the way to `path` leads out of the folder `root`. Raises no error: what is not there leads nowhere."""
    real, root = os.path.realpath(path), os.path.realpath(root)
    return real != root and not real.startswith(root.rstrip(os.sep) + os.sep)


def read_file(path: str | Path, *, where: str, missing: str = "") -> bytes:
    """The bytes of one image file that is a regular one and not too large; raises `ImageError` naming `where`.

    `missing` says what mends one that is not there.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise ImageError("not a regular file", where=where)
        if found.st_size > MAX_FILE:
            raise ImageError(f"{found.st_size:,} bytes, more than {MAX_FILE:,}", where=where)
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError("no such image", where=where, remedy=missing) from None
    except (OSError, ValueError) as error:
        raise ImageError(f"unreadable: {brief(error)}", where=where) from None


def _check_zip(path: Path) -> None:
    """Raises `PipelineError` for what is no zip, and for one whose list of members would not fit in memory."""
    try:
        members = _members(path)
    except (OSError, struct.error):
        members = None
    if members is None or not zipfile.is_zipfile(path):
        raise PipelineError("neither a folder nor a zip", where=str(path), remedy="set data.*.images")
    if members > MAX_MEMBERS:
        what = f"a zip of {members:,} members, more than {MAX_MEMBERS:,}"
        raise PipelineError(what, where=str(path), remedy="unpack it and set data.*.images to the folder")


def _members(path: Path) -> int | None:
    """How many members a zip has room for in its list: by the list's length, which no count in the file can belie."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - (1 << 16) - 22))
        tail = file.read()
        place = tail.rfind(b"PK\5\6")
        if place < 0 or len(tail) < place + 22:
            return None
        (length,) = struct.unpack_from("<I", tail, place + 12)
        larger = tail.rfind(b"PK\6\6", 0, place)
        if length == 0xFFFFFFFF and larger >= 0:
            (length,) = struct.unpack_from("<Q", tail, larger + 40)
    return int(length) // 46


def digest(data: bytes) -> bytes:
    """The identity of an image: SHA-256 of its file's bytes, 32 bytes."""
    return hashlib.sha256(data).digest()


def as_arrow(hashes: np.ndarray) -> pa.Array:
    """Hashes uint8 [n, 32] as an Arrow array of fixed-size binaries, without a copy."""
    data = pa.py_buffer(np.ascontiguousarray(hashes, dtype=np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(hashes), [None, data])
