"""Files that are known by their checksum: a folder's `checksums.json`, written last, and JSON that carries its own.

    {"files": {"model.safetensors": {"size": 9151488, "xxh3_128": "c50f…"}, …}, "xxh3_128": "…"}

xxh3 finds what disks, copies and careless hands do, at the speed of memory; it is no signature against malice. Nothing here
looks at dates: a file is what its bytes are. Hidden files (.DS_Store, .git) belong to nobody and are passed over.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import xxhash

from pipeline.core.errors import ARTEFACT, PipelineError, brief

CHECKSUMS = "checksums.json"
OWN = "xxh3_128"
BLOCK = 1 << 18  # bytes read at a time: they stay in a processor's cache until they are hashed
THREADS = 4  # files hashed at once: one core reads some 4 GB/s, disks give more
PASSED_OVER = ("Thumbs.db", "desktop.ini")


def to_json(content: Any) -> str:
    """The one way this project writes JSON: sorted keys; not-a-number is refused, since no reader accepts it."""
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes in hexadecimal, a block at a time; raises `OSError`."""
    found, block = xxhash.xxh3_128(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(memoryview(block)[:count])
    return found.hexdigest()


def file_digests(paths: Sequence[Path]) -> list[str]:
    """`file_digest` of each, several at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(file_digest, paths))


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The same with a checksum of all that it says."""
    return {**content, OWN: xxhash.xxh3_128_hexdigest(to_json(content).encode())}


def unseal(text: str) -> dict[str, Any]:
    """What sealed JSON says; raises ValueError when a byte of it has changed."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(content, dict) or OWN not in content:
        raise ValueError("lacks its own checksum")
    plain = {key: value for key, value in content.items() if key != OWN}
    if to_json(seal(plain)) != text:
        raise ValueError("has changed since it was written")
    return plain


def sign(folder: Path) -> None:
    """Write `checksums.json` over every file of a folder that is not yet to be seen by others; what `record` knows is kept."""
    known = _listed(folder) if (folder / CHECKSUMS).exists() else {}
    names = sorted(_files(folder))
    with ThreadPoolExecutor(THREADS) as pool:
        entries = dict(zip(names, pool.map(lambda name: known.get(name) or _entry(folder / name), names), strict=True))
    (folder / CHECKSUMS).write_text(to_json(seal({"files": entries})), encoding="utf-8")


def record(path: Path) -> None:
    """Add one finished file to the `checksums.json` of its folder."""
    listed = path.parent / CHECKSUMS
    entries = _listed(path.parent) if listed.exists() else {}
    listed.write_text(to_json(seal({"files": {**entries, path.name: _entry(path)}})), encoding="utf-8")


def verify(folder: Path, *, remedy: str, wanted: Callable[[str], bool] | None = None, alone: bool = True) -> dict[str, str]:
    """Read every file that `checksums.json` lists, or those of them that are `wanted`; returns the checksum of each.

    Raises `PipelineError` naming the first file that is missing, too short or long, another than was written, or, where all
    are wanted and are to be `alone`, not among those that were written. `remedy`: the command that makes the folder anew.
    """
    entries = _listed(folder, remedy)
    chosen = [name for name in sorted(entries) if wanted is None or wanted(name)]
    if wanted is None and alone and (foreign := sorted(_files(folder) - entries.keys())):
        raise _bad(folder / foreign[0], "is not one of the files that were written here", f"remove it, or {remedy}")

    def check(name: str) -> str:
        path, size = folder / name, int(entries[name]["size"])
        try:
            found = path.stat().st_size
            digest = file_digest(path) if found == size else ""
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
            raise _bad(path, what, remedy) from None
        if found != size:
            raise _bad(path, f"has {found:,} bytes, {size:,} were written", remedy)
        if digest != entries[name][OWN]:
            raise _bad(path, "its bytes are not those that were written", remedy)
        return digest

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(chosen, pool.map(check, chosen), strict=True))


def is_signed(folder: Path) -> bool:
    """Whether a folder says anything about its files' checksums."""
    return (folder / CHECKSUMS).exists()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, OWN: file_digest(path)}


def _fail(error: OSError) -> NoReturn:
    raise error  # by itself os.walk passes over a folder that cannot be listed


def _files(folder: Path) -> set[str]:
    found = set[str]()
    for parent, folders, files in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        within = Path(parent).relative_to(folder)
        found |= {(within / name).as_posix() for name in files if not name.startswith(".") and name not in PASSED_OVER}
    return found - {CHECKSUMS}


def _listed(folder: Path, remedy: str = "") -> dict[str, dict[str, Any]]:
    path = folder / CHECKSUMS
    try:
        entries: dict[str, dict[str, Any]] = unseal(path.read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            inner = PurePosixPath(name)
            if inner.is_absolute() or ".." in inner.parts or not (isinstance(entry["size"], int) and isinstance(entry[OWN], str)):
                raise ValueError(f"lists {name!r}")
        return entries
    except FileNotFoundError:
        raise _bad(path, "is missing, so nothing says whether the files beside it are whole", remedy) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(path, f"cannot be used: {brief(error)}", remedy) from None


def _bad(path: Path, what: str, remedy: str) -> PipelineError:
    return PipelineError(what, where=str(path), remedy=remedy, code=ARTEFACT)
