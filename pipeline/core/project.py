"""Where the project is, wherever one stands: commands work from any folder, and a project that has moved is found as a whole."""

import os
from collections.abc import Sequence
from pathlib import Path

MARKS = ("params.yaml", "dvc.yaml")
_CHECKOUT = Path(__file__).parents[2]


def project_of(*places: Path) -> Path | None:
    """The nearest folder, at or above one of the places, that holds a project."""
    for place in places:
        for start in (Path(os.path.abspath(place)), Path(os.path.realpath(place))):
            for folder in (start, *start.parents):
                if all((folder / mark).is_file() for mark in MARKS):
                    return folder
    return None


def enter_project(*, reads: Sequence[Path] = (), writes: Sequence[Path] = ()) -> list[Path]:
    """Go to the root of the project: that of this folder, else that of what is read, else this program's own checkout.

    Returns the paths such that they mean the same from there; one to read that is not here is the project's.
    """
    here = Path.cwd()
    root = here if (here / MARKS[0]).exists() else project_of(here, *(path for path in reads if path.exists()), _CHECKOUT)
    if root is None or root == here:
        return [*reads, *writes]
    found = [Path(os.path.abspath(path)) if os.path.lexists(path) else path for path in reads]
    found += [Path(os.path.abspath(path)) for path in writes]
    os.chdir(root)
    return found


def in_project(path: Path) -> Path:
    """The path itself, or, where nothing is there, the same within the project of this folder or of this program."""
    root = None if path.exists() or path.is_absolute() else project_of(Path.cwd(), _CHECKOUT)
    return root / path if root and root != Path.cwd() and (root / path).exists() else path


def named_by(folder: str | Path, model: str) -> str:
    """A model as the checkpoint in `folder` names it: a relative path is one of the project that the folder lies in.

    So a project that has moved finds its own. What lies in no folder above is returned as it is: a hub id, say.
    """
    if not model or os.path.isabs(model):
        return model
    for start in (os.path.abspath(folder), os.path.realpath(folder)):
        for parent in Path(start).parents:
            if (parent / model).is_dir():
                return model if parent == Path.cwd() else str(parent / model)
    return model
