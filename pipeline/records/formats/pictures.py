"""A row's pictures: named files, or bytes within the row itself, each with a name that finds it again.

A file within the image root keeps its own name. Bytes in a row are named `FILE#KEY/SLOT`: the file of rows, the row's key
in it (an offset or a number) and the slot. `Pictures` reads both, as `pipeline.records.images.ImageRoot` reads files.
"""

import base64
import binascii
import io
import os
import re
import threading
from collections.abc import Callable
from typing import Any

from PIL import Image

from pipeline.core import PipelineError, brief
from pipeline.records.decoder import FORMATS
from pipeline.records.formats.row import Bytes, Reader
from pipeline.records.images import ImageError, ImageRoot
from pipeline.records.record import bad_row, is_half_surrogate

FILLER = 8  # pixels: side of the picture that stands in a column that may not be empty
OPEN = 32  # files of rows that stay open
LONGEST_NAME = 4096  # no file system has longer paths
_KEY = re.compile(r"(\d{1,18})/(\d{1,9})")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def listed(value: Any, where: str, *, part_at_commas: bool = False) -> list[Any]:
    """What stands in an image column -> its pictures: names (text) or bytes; raises `PipelineError` for anything else."""
    if value is None or value in ("", b""):
        return []
    if part_at_commas and isinstance(value, str) and not value.startswith("data:"):
        value = [name.strip() for name in value.split(",")]
    pictures = value if isinstance(value, list) else [value]
    return [_picture(picture, position, where) for position, picture in enumerate(pictures)]


def _picture(value: Any, position: int, where: str) -> Any:
    if isinstance(value, dict):  # an image of Hugging Face's `datasets`
        data, path = value.get("bytes"), value.get("path")
        value = data if data is not None else path
    if isinstance(value, bytes | Bytes):
        if value == b"":
            raise bad_row(f"image {position} is empty", where)
        return value
    if not isinstance(value, str):
        raise bad_row(f"image {position} is {type(value).__name__}, expected a file name or bytes", where)
    if not value:
        raise bad_row(f"image {position} has no name", where, "name a file; in `image` commas part names, in `images` they do not")
    if value.startswith("data:"):
        _decode_url(value, position, where)
    elif len(value) > LONGEST_NAME:
        raise bad_row(f"image {position} has a name of {len(value):,} letters", where, "give base64 as a data URL")
    elif _SCHEME.match(value):
        scheme = value.partition(":")[0]
        raise bad_row(f"image {position} is a {scheme} address", where, "download the pictures and name their files")
    if is_half_surrogate(value):
        raise bad_row(f"image {position}: its name is not UTF-8 or has half a surrogate pair", where)
    return value


def _decode_url(url: str, position: int, where: str) -> bytes:
    """The bytes of a data URL (RFC 2397), of which only the base64 kind can hold a picture."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise bad_row(f"image {position} is a data URL without ;base64", where)
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_row(f"image {position}: broken base64: {brief(error)}", where) from None
    if not data:
        raise bad_row(f"image {position} is empty", where)
    return data


def is_filler(value: Any) -> bool:
    """Bytes of a picture of at most `FILLER` pixels a side, told from its header."""
    if not isinstance(value, bytes):
        return False
    try:
        with Image.open(io.BytesIO(value), formats=FORMATS) as image:
            return max(image.size) <= FILLER
    except Exception:  # whatever the decoder raises, it is no such picture; who places it will say what it is
        return False


def name_of(value: Any, slot: int, file: str, key: int | None, files: frozenset[str], where: str) -> str:
    """The name under which `Pictures` finds a row's picture; raises `PipelineError` for one that would mean another."""
    if isinstance(value, str) and not value.startswith("data:"):
        if _split(value, files):
            raise bad_row(f"image {slot}: {value!r} reads as a place in a file of rows", where, "rename the picture")
        return value
    if key is None:
        raise bad_row(f"image {slot} stands in the row itself, which has no place to be found again", where, "use a file")
    return f"{file}#{key}/{slot}"


def _split(name: str, files: frozenset[str]) -> tuple[str, int, int] | None:
    """File, key and slot of a picture within a row; None for a name within the image root."""
    if "#" not in name:
        return None
    file, _, place = name.rpartition("#")
    found = _KEY.fullmatch(place)
    return (file, int(found[1]), int(found[2])) if file in files and found else None


class Pictures:
    """Bytes of a source's pictures by name. Pickles as what it was made from; safe in threads and forked workers.

    Args:
        path: what messages call it.
        root: folder or zip for pictures that are files; "" where rows name none.
        open_reader: a file of rows -> its reader. Must pickle.
        pictures_of: a row's content -> its pictures in slot order. Must pickle.
        follow: links below `root`, as `ImageRoot` says.
    """

    def __init__(
        self,
        path: str,
        root: str,
        files: frozenset[str],
        open_reader: Callable[[str], Reader],
        pictures_of: Callable[[dict[str, Any]], list[Any]],
        follow: bool = True,
    ) -> None:
        self.path = path
        self._made_from = path, root, files, open_reader, pictures_of, follow
        self._root = ImageRoot(root, follow=follow) if root else None
        self._files, self._open_reader, self._pictures_of = files, open_reader, pictures_of
        self._readers: dict[str, Reader] = {}
        self._owner, self._lock = -1, threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_from

    def place(self, name: str) -> str:
        """What messages call one image: the folder or zip and its name there; within a row its name says all."""
        return name if self._root is None or _split(name, self._files) else self._root.place(name)

    def read(self, name: str) -> bytes:
        """The bytes of one image; raises `ImageError` naming it."""
        place = _split(name, self._files)
        if place is None:
            if self._root is None:
                raise ImageError("in which folder or zip?", where=f"{self.path}: {name!r}", remedy="set data.*.images")
            return self._root.read(name)
        file, key, slot = place
        with self._lock:  # a reader keeps its place in the file
            if self._owner != os.getpid() or len(self._readers) > OPEN:
                self._readers, self._owner = {}, os.getpid()
            if file not in self._readers:
                self._readers[file] = self._open_reader(file)
            return self._within(self._readers[file], key, slot, name)

    def _within(self, reader: Reader, key: int, slot: int, name: str) -> bytes:
        try:
            picture = self._pictures_of(reader.content(key))[slot]
            if isinstance(picture, str) and picture.startswith("data:"):
                picture = _decode_url(picture, slot, name)
        except (PipelineError, IndexError, OSError) as error:
            what = error.what if isinstance(error, PipelineError) else brief(error)
            raise ImageError(f"no such image any more: {what}", where=name) from None
        if not isinstance(picture, bytes):
            raise ImageError("no such image any more", where=name)
        return picture
