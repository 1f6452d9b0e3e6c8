"""This project's own files: temporary ones of killed runs, states nobody goes on from, stores nobody reads, models that lack."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import PipelineError, is_left_over
from pipeline.doctor.finding import Finding, megabytes, size_of
from pipeline.params import load, read_yaml

DAY = 86400  # seconds
PLACES = ("", "data", "models", "results", "metrics", ".dvc/features", ".dvc/features/*", ".dvc/tmp/resume/*")
POINTER = b"version https://git-lfs.github.com/spec"


def temporary_files(root: Path) -> Iterator[Finding]:
    """What a run was writing when it was killed; the next run of the same stage removes it too."""
    for place in PLACES:
        for folder in root.glob(place) if "*" in place else [root / place]:
            for path in sorted(folder.glob(".*.tmp")):
                if is_left_over(path):
                    name = path.relative_to(root)

                    def mend(path: Path = path) -> None:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

                    yield Finding(f"{name}: left by a killed run, {megabytes(size_of(path))}", f"rm -r {name}", mend)


def unfinished_runs(root: Path) -> Iterator[Finding]:
    """States of training runs that did not come to their end: the same command goes on, so they are kept until told."""
    for path in sorted((root / ".dvc/tmp/resume").glob("*-*")):
        steps = sorted(state.name for state in path.glob("[0-9]*"))
        if steps:
            days = (time.time() - max(state.stat().st_mtime for state in path.glob("[0-9]*"))) / DAY
            stage, name = path.name.partition("-")[0], path.relative_to(root)
            what = f"{name}: {stage} stopped after step {int(steps[-1])}, {days:.0f} days ago, {megabytes(size_of(path))}"
            yield Finding(what, f"dvc repro {stage} with the same parameters goes on; else rm -r {name}")


def unused_stores(root: Path) -> Iterator[Finding]:
    """Features of an encoder that no output has: links to them are gone, and no shard of data/features has their names."""
    current = {path.name for path in (root / "data/features").rglob("*.h5")}
    for store in sorted(path for path in (root / ".dvc/features").glob("*") if path.is_dir()):
        shards = list(store.glob("*.h5"))
        if shards and not any(shard.stat().st_nlink > 1 or shard.name in current for shard in shards):
            name = store.relative_to(root)
            what = f"{name}: features that no output and no cached output has, {megabytes(size_of(store))}"
            yield Finding(what, f"rm -r {name}, unless that encoder is tried again")


def missing_models(root: Path) -> Iterator[Finding]:
    """Folders of models that params.yaml or dvc.yaml name and that are not there."""
    try:
        params = load(root / "params.yaml")
        stages = read_yaml(root / "dvc.yaml")["stages"].values()
    except (PipelineError, KeyError, AttributeError) as error:
        yield Finding(error.line() if isinstance(error, PipelineError) else "dvc.yaml has no stages", "python -m pipeline.params")
        return
    listed = {str(dep) for stage in stages for dep in stage.get("deps", [])}
    named = [*(("vision", member.model) for member in params.vision.members), ("llm", params.llm.model)]
    for section, model in named:
        if model in listed and not (root / model / "config.json").is_file():
            yield Finding(f"{section}.model: {model} is no folder with a model", f"git checkout {model}, dvc pull, or set it anew")


def pointers(root: Path) -> Iterator[Finding]:
    """Files that Git LFS has not fetched: a line of text stands where the model should."""
    for folder in ("data", "models"):
        for path in sorted((root / folder).rglob("*.safetensors")) + sorted((root / folder).rglob("*.zip")):
            with path.open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    yield Finding(f"{path.relative_to(root)}: a pointer of Git LFS, not the file", "git lfs pull")
