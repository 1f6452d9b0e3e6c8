"""DVC's own folders: workspaces of killed experiments, locks of dead processes, objects of its cache that are not what they say."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from configparser import ConfigParser
from configparser import Error as ConfigError
from contextlib import suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pipeline.core import is_alive
from pipeline.doctor.finding import Finding, megabytes, processes, size_of

BLOCK = 1 << 20  # bytes read at a time


def temporary_workspaces(root: Path) -> Iterator[Finding]:
    """`dvc exp run --temp` and the queue work in copies of the project; one that was killed leaves its own behind."""
    folder = root / ".dvc/tmp/exps"
    busy = [place for _, place in processes()]
    for path in sorted([*folder.glob("tmp*"), *folder.glob("standalone/tmp*")]):
        if path.is_dir() and not any(place == path or path in place.parents for place in busy):
            what = f"{path.relative_to(root)}: workspace of a killed experiment, {megabytes(size_of(path))}"
            yield Finding(what, f"rm -rf {path.relative_to(root)}", partial(shutil.rmtree, path))


def stale_locks(root: Path) -> Iterator[Finding]:
    """`.dvc/tmp/rwlock` names the processes that read and write outputs; those of dead ones, or garbage, stop the next run."""
    path = root / ".dvc/tmp/rwlock"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return
    try:
        owners = set(_pids(json.loads(text or "{}")))
    except (ValueError, RecursionError):
        yield Finding(f"{path.relative_to(root)}: not readable as JSON, so DVC stops", f"rm {path.relative_to(root)}", path.unlink)
        return
    dead = sorted(pid for pid in owners if not is_alive(pid))
    if dead and dead == sorted(owners):
        what = f"{path.relative_to(root)}: locks of process {dead[0]}, which is dead"
        yield Finding(what, f"rm {path.relative_to(root)} (DVC does so itself as a rule)", path.unlink)


def _pids(content: object) -> Iterator[int]:
    if isinstance(content, dict):
        if isinstance(content.get("pid"), int):
            yield content["pid"]
        for value in content.values():
            yield from _pids(value)
    elif isinstance(content, list):
        for value in content:
            yield from _pids(value)


def changed_cache(root: Path) -> Iterator[Finding]:
    """Outputs are hard links to DVC's cache: who writes into one changes the cache, and DVC gives the wrong bytes out as right.

    Every object is read; its name is the MD5 of its content.
    """
    folder = _cache(root) / "files/md5"
    objects = sorted(path for path in folder.glob("[0-9a-f][0-9a-f]/*") if path.is_file() and path.suffix in ("", ".dir"))
    for path in tqdm(objects, desc="doctor: reading DVC's cache", unit="file", leave=False, mininterval=0.5, disable=None):
        if _md5(path) != path.parent.name + path.stem:
            named = _names_in_workspace(root, path)
            what = f"{path}: its content is not that of its name: it was written into{f' through {named[0]}' if named else ''}"

            def mend(path: Path = path, named: list[Path] = named) -> None:
                for each in (path, *(root / name for name in named)):
                    each.unlink()

            yield Finding(what, f"rm {' '.join(map(str, (path, *named)))}, then dvc checkout or dvc repro", mend)


def _cache(root: Path) -> Path:
    """Where DVC's config, the user's own first, puts the cache."""
    config = ConfigParser(interpolation=None)
    with suppress(ConfigError):
        config.read([root / ".dvc/config", root / ".dvc/config.local"])
    return root / ".dvc" / config.get("cache", "dir", fallback="cache")


def _md5(path: Path) -> str:
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _names_in_workspace(root: Path, path: Path) -> list[Path]:
    """Outputs that are the same file as an object of the cache."""
    found = path.stat()
    if found.st_nlink < 2:
        return []
    names = []
    for top in ("data", "models", "results"):
        for folder, _, files in os.walk(root / top):
            for name in files:
                other = Path(folder, name)
                if other.lstat().st_ino == found.st_ino and other.lstat().st_dev == found.st_dev:
                    names.append(other.relative_to(root))
    return names
