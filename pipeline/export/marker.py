"""glance_export.json in an export: it says that the folder is ours to replace, and holds what the way back needs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import ARTEFACT, PipelineError, brief, is_signed, verify, write_json

if TYPE_CHECKING:  # a wrong folder is told before heavy modules are imported
    from pipeline.vlm.model import Manifest

FORMAT = 1
MARKER = "glance_export.json"
NEEDED = {"vision": ("model", "layer", "spec"), "llm": ("image_token",), "projector": ("kind", "width", "hidden")}


def check_target(out: Path) -> None:
    """Raises `PipelineError` unless `out` is new, empty or an earlier export: it is replaced as a whole."""
    if out.is_dir():
        if any(out.iterdir()) and not (out / MARKER).is_file():
            raise PipelineError("is not empty and not an earlier export", where=str(out), remedy="name a new folder")
    elif out.exists():
        raise PipelineError("is a file", where=str(out), remedy="name a new folder")


def write_marker(folder: Path, manifest: "Manifest", *, dtype: str) -> None:
    """Keep what the checkpoint said of itself."""
    write_json(folder / MARKER, {"format": FORMAT, "dtype": dtype, "manifest": asdict(manifest)})


def read_marker(folder: Path) -> "Manifest":
    """The manifest of the checkpoint that was exported; raises `PipelineError` for any other folder, or naming a damaged file.

    An export that was trained further elsewhere has no `checksums.json`, and is taken as it is.
    """
    from pipeline.vlm.model import Manifest

    path = folder / MARKER
    if is_signed(folder) and path.exists():
        verify(folder, remedy="export again, or delete checksums.json where files were changed on purpose", alone=False)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        manifest = Manifest(**content["manifest"])
        for part, keys in NEEDED.items():
            for key in keys:
                getattr(manifest, part)[key]
        return manifest
    except FileNotFoundError:
        remedy = "name a folder that `python -m pipeline.export MODEL OUT` has written"
        raise PipelineError("no export of this pipeline here", where=str(folder), remedy=remedy, code=ARTEFACT) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"not an export: {brief(error)}", where=str(path), remedy="export again", code=ARTEFACT) from None
