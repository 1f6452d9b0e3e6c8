"""A folder of pictures, each with a sidecar of the same stem: `a.jpg` with `a.txt` (a caption) or `a.json` (a row).

Where both stand, as img2dataset leaves them, the .json counts if it holds a conversation, else the .txt.
"""

import os
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from pipeline.core import PipelineError
from pipeline.records.formats.keys import QUESTION_KEYS, TEXT_KEYS, TURN_KEYS
from pipeline.records.formats.lines import parse_object
from pipeline.records.formats.pictures import listed
from pipeline.records.formats.row import MAX_ROW, BadRow, Row
from pipeline.records.images import FORBIDDEN, ImageError, ImageRoot, leads_out

SIDECARS = ("txt", "json")


def sidecar_content(text: str | None, row: dict[str, Any] | None) -> dict[str, Any]:
    """What a sample's .txt and .json say together, without its pictures."""
    if row is not None and (text is None or any(row.get(key) for key in (*TURN_KEYS, *QUESTION_KEYS))):
        return row
    return {key: value for key, value in (row or {}).items() if key not in TEXT_KEYS} | {TEXT_KEYS[0]: text}


class Folder:
    """A folder and the folders within it, in the order of their names' bytes; hidden files are left out.

    Linked folders are gone through as others are; one that leads back to a folder above it is a bad row, and so is one that
    leads out where links are not to be followed.
    """

    def __init__(self, file: str, follow: bool = True) -> None:
        self.file, self._follow = file, follow

    def names(self) -> None:
        """Sidecars have keys of their own."""

    def rows(self) -> Iterator[Row | BadRow]:
        waiting = [("", frozenset[tuple[int, int]]())]
        while waiting:
            within, above = waiting.pop()
            path = os.path.join(self.file, within)
            try:
                place = place_of(path)
                with os.scandir(path) as scan:
                    entries = [entry for entry in scan if not entry.name.startswith(".")]
            except OSError as error:
                yield BadRow(self.file, within or ".", f"cannot be listed: {error.strerror}", rows=1, ends_file=True)
                return
            if place in above:
                yield BadRow(self.file, within, "a link that leads back to a folder above it", "remove the link")
                continue
            if not self._follow and leads_out(path, self.file):
                yield BadRow(self.file, within, "a link that leads out of the folder", FORBIDDEN)
                continue
            entries.sort(key=lambda entry: os.fsencode(entry.name))
            files = [entry.name for entry in entries if not entry.is_dir()]
            for stem, names in groupby(sorted(files, key=_stem_first), key=lambda name: name.rpartition(".")[0] or name):
                yield self._sample(within, stem, list(names))
            waiting += [(os.path.join(within, e.name), above | {place}) for e in reversed(entries) if e.is_dir()]

    def _sample(self, within: str, stem: str, names: list[str]) -> Row | BadRow:
        where = os.path.join(within, stem)
        sidecars = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[2] in SIDECARS}
        pictures = [os.path.join(within, name) for name in names if name not in sidecars.values()]
        if not sidecars:
            return BadRow(
                self.file,
                pictures[0],
                "a picture without a .txt or .json beside it",
                "write one, remove the file, or name data files themselves instead of their folder",
            )
        if len(pictures) > 1:
            return BadRow(self.file, where, f"{len(pictures)} files share one sidecar: {', '.join(pictures)}", "rename them")
        try:
            text = self._text(within, sidecars["txt"]) if "txt" in sidecars else None
            row = parse_object(self._text(within, sidecars["json"]), where="") if "json" in sidecars else None
            content = sidecar_content(text, row)
            if pictures:
                self._check_named(content, pictures[0])
                content = {**content, "image": None, "images": [pictures[0]]}
            elif any(key in content for key in TEXT_KEYS) and not any(key in content for key in TURN_KEYS):
                return BadRow(self.file, where, "a caption without a picture beside it")
        except (PipelineError, OSError, ValueError) as error:
            what = error.what if isinstance(error, PipelineError) else f"its sidecar is unreadable: {error}"
            return BadRow(self.file, where, what)
        return Row(self.file, where, content, None)

    def _text(self, within: str, name: str) -> str:
        if os.stat(os.path.join(self.file, within, name)).st_size > MAX_ROW:
            raise PipelineError(f"its sidecar is longer than {MAX_ROW >> 20} MiB")
        text = ImageRoot(self.file, follow=self._follow).read(os.path.join(within, name))
        return text.decode("utf-8-sig").strip("\r\n")

    def _check_named(self, content: dict[str, Any], picture: str) -> None:
        """A sidecar may name its picture; naming another one is a mistake in one of the two."""
        for name in listed(content.get("images") or content.get("image"), ""):
            if not isinstance(name, str) or os.path.basename(name) != os.path.basename(picture):
                shown = name if isinstance(name, str) else "bytes"
                raise PipelineError(f"its .json names {shown!r:.100}, the picture beside it is {picture!r}")

    def content(self, key: int) -> dict[str, Any]:
        raise ImageError("a folder's pictures are files", where=f"{self.file}:{key}")


def place_of(folder: str) -> tuple[int, int]:
    """By which a folder is known under whatever name; raises OSError."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _stem_first(name: str) -> tuple[bytes, bytes]:
    stem, _, kind = name.rpartition(".")
    return os.fsencode(stem or name), os.fsencode(kind)
