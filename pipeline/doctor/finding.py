"""What a check finds, and what the checks share: sizes, git's answers, which processes are alive."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Finding:
    """`what` is wrong, the `remedy` as a command or a sentence, and `mend`, which does it where no work can be lost."""

    what: str
    remedy: str
    mend: Callable[[], object] | None = None


Check = Callable[[Path], Iterator[Finding]]


def git(root: Path, *arguments: str) -> str | None:
    """What a git command prints, None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, each once however many names it has."""
    seen: dict[tuple[int, int], int] = {}
    for file in path.rglob("*") if path.is_dir() else [path]:
        try:
            found = file.lstat()
        except OSError:  # it has gone meanwhile
            continue
        if not file.is_dir():
            seen[found.st_dev, found.st_ino] = found.st_size
    return sum(seen.values())


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def processes() -> Iterator[tuple[int, Path]]:
    """Every process that can be looked at, with the folder it works in. Linux only."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            yield int(entry.name), Path(os.readlink(entry / "cwd"))
        except OSError:
            continue
