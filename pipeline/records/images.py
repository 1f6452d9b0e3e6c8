"""Image files: where they lie (a folder or a zip) and the one decoder that every stage uses.

Everywhere downstream an image is the SHA-256 of its file's bytes, so the same picture under two names is one image.
"""

import hashlib
import io
import os
import stat
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.core import BAD_ROWS, PipelineError, brief

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # parsers an image may reach; EPS would start another program
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded
MAX_RATIO = 200  # of the sides: a strip, resized until its short side fits an encoder, would take gigabytes
DECODER = 1  # part of every feature's fingerprint: raise it when a decoded pixel can change


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

    Cheap to pickle and safe in forked workers and threads: a zip is opened anew in each process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise PipelineError("no such folder or zip", where=str(path), remedy="set data.*.images")
        self._is_zip = self.path.is_file()
        if self._is_zip and not zipfile.is_zipfile(self.path):
            raise PipelineError("neither a folder nor a zip", where=str(path), remedy="set data.*.images")
        self._root = os.path.realpath(self.path)
        self._archive: zipfile.ZipFile | None = None
        self._owner, self._lock = -1, threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def place(self, name: str) -> str:
        """What messages call one image."""
        return f"{self.path}: {name!r}"

    def read(self, name: str) -> bytes:
        """The bytes of one image file; raises `ImageError` naming it."""
        return self._read_member(name) if self._is_zip else self._read_file(name)

    def _read_member(self, name: str) -> bytes:
        where = f"{self.path}: {name!r}"
        with self._lock:  # a ZipFile keeps one file position
            try:
                if self._archive is None or self._owner != os.getpid():
                    self._archive, self._owner = zipfile.ZipFile(self.path), os.getpid()
                return self._archive.read(name)
            except KeyError:
                raise ImageError("no such image in the zip", where=where) from None
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError) as error:
                raise ImageError(f"unreadable: {brief(error)}", where=where) from None

    def _read_file(self, name: str) -> bytes:
        where = f"{self.path}: {name!r}"
        if "\0" in name or "://" in name:
            raise ImageError("not a file name", where=where)
        try:
            path = os.path.realpath(os.path.join(self._root, name), strict=True)
            if os.path.commonpath([self._root, path]) != self._root:
                raise ImageError("lies outside the image root", where=where)
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ImageError("not a regular file", where=where)
            return Path(path).read_bytes()
        except FileNotFoundError:
            raise ImageError("no such image", where=where) from None
        except (OSError, ValueError) as error:
            raise ImageError(f"unreadable: {brief(error)}", where=where) from None


def digest(data: bytes) -> bytes:
    """The identity of an image: SHA-256 of its file's bytes, 32 bytes."""
    return hashlib.sha256(data).digest()


def check_size(size: tuple[int, int], *, where: str) -> None:
    """Raises `ImageError` for a picture of too many pixels, or so narrow that resizing it would make too many."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}×{height} pixels, more than {MAX_PIXELS:,}", where=where)
    if max(size) > MAX_RATIO * min(size):
        raise ImageError(f"{width}×{height} pixels, its sides more than {MAX_RATIO} to 1", where=where)


def decode(data: bytes, *, where: str) -> Image.Image:
    """Image file -> upright RGB picture: first frame, EXIF orientation applied, transparency on white, 16 bits scaled.

    Raises `ImageError` whatever the decoder raised: 38 of 40,000 damaged files raise something other than OSError.
    """
    if not data:
        raise ImageError("empty file", where=where)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.size, where=where)
            return _to_rgb(ImageOps.exif_transpose(image), where)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not a picture in a known format ({', '.join(FORMATS)})", where=where) from None
    except Exception as error:
        raise ImageError(f"not a picture that can be decoded: {brief(error)}", where=where) from None


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # Pillow's own conversion cuts everything above 255 off
        values = np.asarray(image.convert("I"), dtype=np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("32-bit pixels: neither 8 nor 16 bits a channel", where=where)
        return Image.fromarray((values / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels", where=where)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def as_arrow(hashes: np.ndarray) -> pa.Array:
    """Hashes uint8 [n, 32] as an Arrow array of fixed-size binaries, without a copy."""
    data = pa.py_buffer(np.ascontiguousarray(hashes, dtype=np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(hashes), [None, data])
