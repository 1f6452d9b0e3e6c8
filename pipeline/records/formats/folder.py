"""A folder of pictures, each with a sidecar of the same stem: `a.jpg` with `a.txt` (a caption) or `a.json` (a row).

Where both stand, as img2dataset leaves them, the .json counts if it holds a conversation, else the .txt.
"""

import os
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from pipeline.core import PipelineError
from pipeline.records.formats.conversation import TEXT_KEYS, TURN_KEYS
from pipeline.records.formats.lines import parse_object
from pipeline.records.formats.pictures import listed
from pipeline.records.formats.row import MAX_ROW, BadRow, Row
from pipeline.records.images import ImageError, ImageRoot

SIDECARS = ("txt", "json")


def sidecar_content(text: str | None, row: dict[str, Any] | None) -> dict[str, Any]:
    """What a sample's .txt and .json say together, without its pictures."""
    if row is not None and (text is None or any(row.get(key) for key in TURN_KEYS)):
        return row
    return {TEXT_KEYS[0]: text}


class Folder:
    """A folder and the folders within it, in the order of their names' bytes; hidden files and linked folders are left out."""

    def __init__(self, file: str) -> None:
        self.file = file

    def names(self) -> None:
        """Sidecars have keys of their own."""

    def rows(self) -> Iterator[Row | BadRow]:
        yield from self._walk("")

    def _walk(self, within: str) -> Iterator[Row | BadRow]:
        try:
            with os.scandir(os.path.join(self.file, within)) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: os.fsencode(e.name))
        except OSError as error:
            yield BadRow(self.file, within or ".", f"cannot be listed: {error.strerror}", rows=1, ends_file=True)
            return
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        files = [entry.name for entry in entries if not entry.is_dir()]
        for stem, names in groupby(sorted(files, key=_stem_first), key=lambda name: name.rpartition(".")[0] or name):
            yield self._sample(within, stem, list(names))
        for name in folders:
            yield from self._walk(os.path.join(within, name))

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
        return ImageRoot(self.file).read(os.path.join(within, name)).decode("utf-8-sig").strip("\r\n")  # it cannot leave the folder

    def _check_named(self, content: dict[str, Any], picture: str) -> None:
        """A sidecar may name its picture; naming another one is a mistake in one of the two."""
        for name in listed(content.get("images") or content.get("image"), ""):
            if not isinstance(name, str) or os.path.basename(name) != os.path.basename(picture):
                shown = name if isinstance(name, str) else "bytes"
                raise PipelineError(f"its .json names {shown!r:.100}, the picture beside it is {picture!r}")

    def content(self, key: int) -> dict[str, Any]:
        raise ImageError("a folder's pictures are files", where=f"{self.file}:{key}")


def _stem_first(name: str) -> tuple[bytes, bytes]:
    stem, _, kind = name.rpartition(".")
    return os.fsencode(stem or name), os.fsencode(kind)
