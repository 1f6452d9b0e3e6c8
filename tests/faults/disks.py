"""Writers and stages on a disk that fills up: a small tmpfs that is mounted for the trial, then given room (needs root)."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import stage_kills

from benchmarks.kills import Trials, is_one_line, run
from pipeline.core import LAUNCHED

ROOM = "size=1g"


def can_mount(scratch: Path) -> bool:
    """Whether a disk can be made here."""
    try:
        with _disk(scratch, ROOM):
            return True
    except OSError:
        return False


@contextmanager
def _disk(scratch: Path, size: str) -> Iterator[Path]:
    folder = scratch / "disk"
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", size, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, timeout=60)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise OSError(f"mount: {done.stderr.strip()}")


def _resize(folder: Path, size: str) -> None:
    _mount("-o", f"remount,{size}", str(folder))


def _stage(name: str, folder: Path) -> None:
    """A stage whose pre-flight, which would refuse such a disk beforehand, is left out."""
    os.environ[LAUNCHED] = os.devnull
    stage_kills.stage(name, folder)


def used(folder: Path, *, copied: bool = False) -> int:
    """Bytes that the files of a folder take on such a disk, whole pages each; one of several names counts once, but in a copy."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path if copied else path.lstat().st_ino: path.lstat().st_size for path in files}
    return sum(-(-size // 4096) * 4096 for size in sizes.values())


def fill_writer(trials: Trials, scratch: Path, share: float) -> str:
    """A disk with room for this share of what the jobs leave: one line, and the next run, with room, completes."""
    with trials.folder() as folder:
        trials.work(folder)
        size = max(4096, int(share * used(folder)) // 4096 * 4096)
    with _disk(scratch, f"size={size}") as folder:
        ended = run(partial(trials.work, folder))
        _resize(folder, ROOM)
        return trials.judge(folder, f"{size:,} bytes of disk", ended, is_one_line(ended))


def fill_stage(stages: stage_kills.StageKills, number: int, scratch: Path, share: float) -> str:
    """As `fill_writer` for a stage, which has room for this share of what it adds."""
    before, after = used(stages.after[number], copied=True), used(stages.after[number + 1])
    name, room = stage_kills.STAGES[number], int(share * (after - before)) // 4096 * 4096
    with _disk(scratch, ROOM) as disk:
        folder = disk / "project"
        stages.copy(stages.after[number], folder)
        taken = int(subprocess.run(["du", "-s", "-B1", str(disk)], capture_output=True, text=True, check=True).stdout.split()[0])
        _resize(disk, f"size={-(-taken // 4096) * 4096 + max(4096, room)}")
        job: Callable[[], None] = partial(_stage, name, folder)
        ended = run(job, limit=stage_kills.LIMIT)
        _resize(disk, ROOM)
        if not is_one_line(ended):
            return f"{name} with {room:,} bytes of disk: ended with {ended.code} and {ended.text[-300:]!r}"
        return stages.judge(f"{name} with {room:,} bytes of disk", run(job, limit=stage_kills.LIMIT), folder, number)
