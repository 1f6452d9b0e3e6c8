"""Which reader a file or folder needs, told from its content; and which files a name stands for."""

import glob
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pipeline.core import PipelineError, brief
from pipeline.records.formats.array import JsonArray
from pipeline.records.formats.columnar import Arrow, Parquet
from pipeline.records.formats.folder import Folder, place_of
from pipeline.records.formats.lines import JsonLines
from pipeline.records.formats.row import Reader
from pipeline.records.formats.table import AS_UTF8, Table, delimiter_of
from pipeline.records.formats.tars import Tar

# The reader of each format, made from a file, which columns are wanted, and whether links are followed
READERS: dict[str, Callable[[str, Callable[[str], bool], bool], Reader]] = {
    "jsonl": lambda file, *_: JsonLines(file),
    "json": lambda file, *_: JsonArray(file),
    "csv": lambda file, *_: Table(file),
    "parquet": lambda file, wanted, _: Parquet(file, wanted),
    "arrow": lambda file, wanted, _: Arrow(file, wanted),
    "webdataset": lambda file, *_: Tar(file),
    "folder": lambda file, _, follow: Folder(file, follow),
}
FORMATS = (*READERS, "hub")  # whose files are Arrow's
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # an ImageFolder of `datasets`
_HEAD = 1 << 20
_REMEDY = "give JSON lines, a JSON array, CSV, TSV, Parquet, Arrow, a WebDataset tar or a folder of pictures"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


def expand(records: str | tuple[str, ...]) -> list[str]:
    """The files and folders that a name, a glob or a list of them stands for; a glob's in the order of their names' bytes.

    Raises `PipelineError` for a name that is not there and a glob that meets nothing.
    """
    found: list[str] = []
    for name in (records,) if isinstance(records, str) else records:
        if os.path.exists(name):
            found.append(name)
        elif glob.has_magic(name):
            _refuse_loops(name)
            files = sorted(glob.glob(name, recursive=True), key=os.fsencode)
            if not files:
                raise PipelineError("no file matches", where=name, remedy="set data.*.records")
            found += files
        else:
            raise PipelineError(
                "no such file", where=name, remedy="set data.*.records; for a data set of the hub set its format to hub"
            )
    if not found:
        raise PipelineError("an empty list of files", remedy="set data.*.records")
    twice = [name for name, times in Counter(found).items() if times > 1]
    if twice:
        raise PipelineError("stands twice among the files", where=twice[0], remedy="set data.*.records")
    return found


def _refuse_loops(pattern: str) -> None:
    """A `**` follows links, and would go round for ever where one leads back to a folder above it."""
    if "**" not in pattern:
        return
    for top in glob.glob(os.path.dirname(pattern.partition("**")[0]) or "."):
        waiting = [(top, frozenset[tuple[int, int]]())]
        while waiting:
            folder, above = waiting.pop()
            place = place_of(folder)
            if place in above:
                raise PipelineError("a link that leads back to a folder above it", where=folder, remedy="remove the link")
            try:
                with os.scandir(folder) as entries:
                    waiting += [(entry.path, above | {place}) for entry in entries if entry.is_dir()]
            except (NotADirectoryError, FileNotFoundError):
                continue
            except OSError as error:  # glob would pass over all that it holds
                raise PipelineError(f"cannot be listed: {error.strerror}", where=folder) from None


def detect(path: str) -> str:
    """One of `FORMATS`, from the content alone; raises `PipelineError` naming what it looks like and what is read."""
    if os.path.isdir(path):
        return _detect_folder(path)
    try:
        if not os.path.isfile(path):
            raise PipelineError("neither a file nor a folder", where=path, remedy=_REMEDY)
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            whole = len(head) < _HEAD
    except OSError as error:
        raise PipelineError(f"cannot be read: {error.strerror}", where=path) from None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head[257:262] == b"ustar":
        return "webdataset"
    return _detect_text(head, whole, path)


def _detect_folder(path: str) -> str:
    names = set(os.listdir(path))
    if "dataset_dict.json" in names:
        raise PipelineError("a saved DatasetDict", where=path, remedy=f"name one of its splits, such as {_first_folder(path)}")
    return "arrow" if {"dataset_info.json", "state.json"} <= names else "folder"


def _first_folder(path: str) -> str:
    return next((entry.path for entry in sorted(os.scandir(path), key=lambda e: e.name) if entry.is_dir()), path)


def _detect_text(head: bytes, whole: bool, path: str) -> str:
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise PipelineError(
                f"compressed ({name})", where=path, remedy="unpack it: rows are read in place, and pictures at random"
            )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PipelineError("UTF-16, expected UTF-8", where=path, remedy=AS_UTF8)
    text = head.decode("utf-8-sig", "replace").lstrip()
    if not text:
        raise PipelineError("no rows", where=path, remedy="set data.*.records")
    if text[0] == "[":
        return "json"
    if text[0] == "{":
        return _detect_objects(text, path)
    header = text.partition("\n")[0]
    if (whole and "\n" not in text) or "\0" in header or not delimiter_of(header):
        raise PipelineError(f"not a known format; it begins {header[:40]!r}", where=path, remedy=_REMEDY)
    return "csv"


def _detect_objects(text: str, path: str) -> str:
    """JSON lines, or one object over several lines, of which nobody could tell what its rows are."""
    spread = PipelineError("one JSON object over several lines", where=path, remedy=_ONE_LINE)
    if _spans_lines(text):
        raise spread
    if any(_is_object(line) for line in text.split("\n", 20)[:20]):
        return "jsonl"
    if text.startswith(("{\n", "{\r\n")):
        raise spread
    return "jsonl"  # whose first rows are bad, and will be named


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _spans_lines(text: str) -> bool:
    try:
        return "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return False


_ONE_LINE = "put each row on a line of its own, or all in one array"


def saved_files(folder: str) -> list[str]:
    """The Arrow files of a folder that `datasets` saved, in their order; raises `PipelineError` when its list is broken."""
    try:
        state = json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        if out := next((name for name in names if os.path.isabs(name) or ".." in Path(name).parts), None):
            raise ValueError(f"{out!r:.100} lies outside the folder")
        files = [str(Path(folder, name)) for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PipelineError(f"its list of files is broken: {brief(error)}", where=f"{folder}/state.json") from None
    if missing := next((file for file in files if not os.path.isfile(file)), None):
        raise PipelineError("listed in state.json, but not there", where=missing, remedy="save the data set again")
    return files


def metadata_of(folder: str) -> str | None:
    """The table of an ImageFolder; None for a folder of sidecars."""
    found = [name for name in METADATA if os.path.isfile(os.path.join(folder, name))]
    if len(found) > 1:
        raise PipelineError(f"has {' and '.join(found)}: which one counts?", where=folder, remedy="name the file")
    return os.path.join(folder, found[0]) if found else None
