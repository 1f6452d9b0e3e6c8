"""Of which source of a mix a row is, by where it was read: the pattern of `data.heldout.mix` that its file meets."""

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from pipeline.params import Dataset


def source_names(dataset: Dataset) -> Callable[[str], str]:
    """From "file:line" to the pattern, or to the records' own name where they are not mixed."""
    if dataset.mix is None:
        return lambda _: dataset.records
    patterns = {pattern: pattern.split("/") for pattern in dataset.mix}

    @lru_cache(maxsize=4096)
    def of_file(file: str) -> str:
        parts = os.path.relpath(file, dataset.records).split(os.sep)
        return next((name for name, pattern in patterns.items() if _meets(parts, pattern)), dataset.records)

    return lambda where: of_file(where.rpartition(":")[0])


def _meets(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path, or a folder that it lies in, is one that the pattern names, as `glob` reads it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return _meets(parts, pattern[1:]) or (bool(parts) and _meets(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _meets(parts[1:], pattern[1:])
