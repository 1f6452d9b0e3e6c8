"""Single bits flipped and ends cut off in a folder of ours: is it noticed, and is the file named?

`trial(folder, name, change, opened)` changes one file, opens the folder the way a stage does, and puts the file back.
Shards have trials of their own (`benchmarks/damage.py`): their rows are verified when they are read, not when a file is opened.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.core.errors import PipelineError

Change = Callable[[bytes], bytes]


def changes(folder: Path, flips: int, cuts: int, seed: int) -> Iterator[tuple[str, str, Change]]:
    """File, what happens to it, and how: bits and places drawn over all bytes of the folder, but no cut that cuts nothing."""
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    for number in range(flips + cuts):
        # small files have their turn as well as large ones
        file = rng.choice(files) if number % 2 else rng.choices(files, sizes)[0]
        name, place = str(file.relative_to(folder)), rng.randrange(file.stat().st_size)
        if number < flips:
            mask = 1 << rng.randrange(8)
            yield name, f"bit {mask:#x} of byte {place}", lambda data, place=place, mask=mask: _flipped(data, place, mask)
        else:
            yield name, f"cut at {place}", lambda data, place=place: data[:place]


def _flipped(data: bytes, place: int, mask: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= mask
    return bytes(changed)


def trial(folder: Path, name: str, change: Change, opened: Callable[[Path], object]) -> str:
    """What is wrong with how the change was noticed; nothing where it was, in one line that names the file."""
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(change(data))
    try:
        opened(folder)
    except PipelineError as error:
        line = error.line()
        return "" if path.name in line and "\n" not in line else f"not named: {line}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(data)
    return "not noticed"


def unnoticed(folder: Path, opened: Callable[[Path], object], *, flips: int, cuts: int, seed: int = 0) -> list[str]:
    """The changes that went wrong, each with its file; `opened` must accept the folder as it is."""
    opened(folder)
    return [
        f"{name}: {what}: {problem}"
        for name, what, change in changes(folder, flips, cuts, seed)
        if (problem := trial(folder, name, change, opened))
    ]
