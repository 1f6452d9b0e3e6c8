"""Pictures as a person names them: typed, quoted, dragged into a terminal, or a file:// address."""

import os
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.core import PipelineError
from pipeline.records import ImageError, is_half_surrogate, read_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
OTHER = "give the path of a picture"


def find_pictures(typed: str) -> list[Path]:
    """The files that a line means; text that names one file as it stands is that file, whatever quotes or commas are in it.

    Otherwise quotes and backslashes are read as a shell reads them, `~` is the home folder, and file:// addresses are paths.
    """
    typed = typed.strip()
    if not typed:
        return []
    whole = _plain(typed)
    if _is_there(whole) or not any(mark in typed for mark in "\"'\\ "):
        return [whole]
    try:
        words = [_plain(word) for word in shlex.split(typed)]
    except ValueError:  # a quote that is not closed
        return [whole]
    if len(words) == 1 or all(_is_there(word) for word in words):
        return words
    return [whole]


def names_pictures(typed: str) -> bool:
    """Whether a line is nothing but files that are there, as it is when they are dragged into a terminal."""
    found = find_pictures(typed) if typed[:1] in "/~'\"." or typed.startswith("file:") else []
    return bool(found) and all(_is_file(path) for path in found)


def read_picture(path: Path, *, name: str = "") -> bytes:
    """The bytes of a picture's file; raises `ImageError` naming it (or `name`) when it is no file, too large or unreadable."""
    where = name or show(path)
    try:
        if os.path.isdir(path):
            raise ImageError("a folder, not a picture", where=where)
        return read_file(path, where=where)
    except ImageError as error:
        raise ImageError(error.what, where=where, remedy=OTHER) from None


def show(text: str | Path) -> str:
    """A name that any terminal takes, whatever bytes it is made of."""
    return str(text).encode("utf-8", "replace").decode()


def require_text(text: str, what: str) -> str:
    """Raises `PipelineError` for words that came as bytes which are not UTF-8."""
    if is_half_surrogate(text):
        raise PipelineError(f"{what} is not UTF-8", remedy="type it in a terminal whose encoding is UTF-8")
    return text


def _plain(word: str) -> Path:
    if word.lower().startswith("file:"):
        parts = urlsplit(word)
        if parts.netloc in ("", "localhost"):
            return Path(unquote(parts.path, errors="surrogateescape"))
    try:
        return Path(word).expanduser()
    except RuntimeError:  # ~nobody
        return Path(word)


def _is_there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
