"""What a loss of power may leave of a job's writes, by the page-cache model, and whether any of it would be believed.

Every call that changes files is recorded with the tree before it. At a moment between two calls each folder may have any
version of its entries since its last fsync, and each file that was not synced since it changed may be whole, half there, zeros
or empty: pessimistic, as no order is kept between folders. Bad is a file under its final name with bytes that the undisturbed
run never showed under it, and what stands there when the job has ended but is lost.
"""

import os
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kills import run, watch

Tree = dict[str, Any]  # name -> object number
ROOT = 0


@dataclass(slots=True)
class _Object:
    """A file (versions of its bytes) or a folder (versions of its entries), each with the time it began."""

    is_folder: bool
    versions: list[tuple[int, Any]] = field(default_factory=list)
    synced: int = -1

    def at(self, time: int) -> Any:
        return [content for began, content in self.versions if began <= time][-1]

    def choices(self, time: int, synced: int) -> list[Any]:
        """Contents that may be found when power is lost at `time`, the last sync having been at `synced` (-1: never)."""
        seen = [content for began, content in self.versions if began <= time]
        kept = [content for began, content in self.versions if began <= synced]
        if self.is_folder:
            return ([kept[-1]] if kept else [{}]) + seen[len(kept) :]
        now = seen[-1]
        if kept and kept[-1] == now and len(kept) == len(seen):
            return [now]
        return [now, now[: len(now) // 2], bytes(len(now)), b"", *kept[-1:]]


class Recording:
    """A job's calls, and the tree before each of them: object 0 is the folder itself."""

    def __init__(self) -> None:
        self.objects: list[_Object] = [_Object(True)]
        self.syncs: list[tuple[int, int]] = []  # (time, object)
        self.time = 0
        self._known: dict[int, int] = {}

    def look(self, folder: Path) -> None:
        """Note what stands there now."""
        found: dict[int, int] = {}
        self._visit(folder, ROOT, found)
        self._known = found

    def _visit(self, folder: Path, number: int, found: dict[int, int]) -> None:
        entries: Tree = {}
        for path in sorted(folder.iterdir()):
            inode = path.lstat().st_ino
            child = found.get(inode, self._known.get(inode))
            if child is None or self.objects[child].is_folder != path.is_dir():
                child = len(self.objects)
                self.objects.append(_Object(path.is_dir()))
            found[inode] = child
            entries[path.name] = child
            if path.is_dir():
                self._visit(path, child, found)
            else:
                self._change(child, path.read_bytes())
        self._change(number, entries)

    def _change(self, number: int, content: Any) -> None:
        versions = self.objects[number].versions
        if not versions or versions[-1][1] != content:
            versions.append((self.time, content))

    def sync(self, inode: int, root: int) -> None:
        number = ROOT if inode == root else self._known.get(inode)
        if number is not None:
            self.syncs.append((self.time, number))


def record(job: Callable[[Path], None], folder: Path) -> Recording:
    """The calls of an undisturbed run in a process of its own."""

    def work() -> None:
        found = Recording()
        root = folder.stat().st_ino

        def strike(_: int, name: str, __: Any, arguments: tuple[Any, ...]) -> None:
            found.time += 1
            found.look(folder)
            if name in ("fsync", "fdatasync"):
                found.sync(os.fstat(arguments[0]).st_ino, root)

        watch(strike)
        job(folder)
        found.time += 1
        found.look(folder)
        (folder.parent / f"{folder.name}.pickle").write_bytes(pickle.dumps(found))

    ended = run(work)
    if ended.code:
        raise RuntimeError(ended.text)
    return pickle.loads((folder.parent / f"{folder.name}.pickle").read_bytes())


def states(
    found: Recording, rng: random.Random, *, files: bool = True, folders: bool = True
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Endless states after a loss of power: the moment, and every file by its path. Without `files` or `folders`, syncs of these
    count for nothing."""
    syncs = [(time, number) for time, number in found.syncs if (folders if found.objects[number].is_folder else files)]
    while True:
        time = rng.randint(1, found.time) if rng.random() < 0.9 else found.time
        last = {number: when for when, number in syncs if when < time}
        yield time, dict(_files(found, ROOT, "", time, last, rng))


def _files(
    found: Recording, number: int, prefix: str, time: int, last: dict[int, int], rng: random.Random
) -> Iterator[tuple[str, bytes]]:
    each = found.objects[number]
    choice = rng.choice(each.choices(time, last.get(number, -1)))
    if not each.is_folder:
        yield prefix, choice
        return
    for name, child in choice.items():
        yield from _files(found, child, f"{prefix}/{name}" if prefix else name, time, last, rng)


def bad_states(found: Recording, count: int, seed: int, **syncs: bool) -> int:
    """How many of so many states would be believed wrongly, or lack what the finished job has published."""
    rng, bad = random.Random(seed), 0
    published = {file for time in range(1, found.time + 1) for file in _final(dict(_live(found, ROOT, "", time)))}
    last = {name for name, _ in _final(dict(_live(found, ROOT, "", found.time)))}
    for number, (time, files) in enumerate(states(found, rng, **syncs)):
        if number == count:
            break
        visible = _final(files)
        lost = time == found.time and last - {name for name, _ in visible}
        bad += bool(visible - published or lost)
    return bad


def _live(found: Recording, number: int, prefix: str, time: int) -> Iterator[tuple[str, bytes]]:
    content = found.objects[number].at(time)
    if not found.objects[number].is_folder:
        yield prefix, content
        return
    for name, child in content.items():
        yield from _live(found, child, f"{prefix}/{name}" if prefix else name, time)


def _final(files: dict[str, bytes]) -> set[tuple[str, bytes]]:
    return {(name, data) for name, data in files.items() if not any(part.startswith(".") for part in name.split("/"))}
