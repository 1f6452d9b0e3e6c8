"""Figures of stages behind one that has run alone: beside its own they would be read as the same run's.

`dvc exp run pretrain` leaves metrics/sft.json, of a model that started from another checkpoint, and `dvc exp show` puts both into
one row. Whether the checkpoint is another one dvc.lock tells: the hash, as DVC makes it, from which the later stage has started.
"""

import json
from hashlib import file_digest, md5
from pathlib import Path
from typing import Any

from pipeline.core import PipelineError
from pipeline.params import read_yaml

LOCK = Path("dvc.lock")


def drop_stale_figures(name: str) -> None:
    """Remove the metrics of every stage that started from another models/NAME than the one that is there; says so."""
    model = Path("models") / name
    try:
        stages = read_yaml(LOCK).get("stages", {}) if LOCK.is_file() else {}
        started = {stage: _started_from(content, model) for stage, content in stages.items()}
    except (PipelineError, AttributeError, KeyError, TypeError):  # DVC has its own words for a broken lock
        return
    behind = {stage: Path("metrics") / f"{stage}.json" for stage, known in started.items() if known and known != _hash_of(model)}
    for stage, figures in behind.items():
        if figures.is_file():
            figures.unlink()
            print(f"{name}: {figures} was of another {model} and is removed; dvc repro {stage} makes it anew", flush=True)


def _started_from(stage: dict[str, Any], model: Path) -> str:
    return next((str(dep["md5"]) for dep in stage.get("deps", []) if dep["path"] == model.as_posix()), "")


def _hash_of(folder: Path) -> str:
    """A folder's hash in dvc.lock: of the list of its files, with their own."""
    names = sorted((path.relative_to(folder) for path in folder.rglob("*") if path.is_file()), key=lambda path: path.parts)
    files = [{"md5": _file_hash(folder / name), "relpath": name.as_posix()} for name in names]
    return md5(json.dumps(files, sort_keys=True).encode()).hexdigest() + ".dir"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "md5").hexdigest()
