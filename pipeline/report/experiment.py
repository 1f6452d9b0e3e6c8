"""The files of a run: of the work tree, or of an experiment or commit as git and DVC's cache hold them. Nothing is checked out."""

import subprocess
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from pipeline.core import ARTEFACT, PipelineError, brief, costs_of
from pipeline.params.reading import parse
from pipeline.report.shapes import Metrics, Scores, read_object, shaped

STAGES = ("extract", "tokenize", "pretrain", "sft")
TRAINED = ("pretrain", "sft")
HERE = "work tree"
MAX_TEXT = 128 << 20  # bytes of a file that is read whole: a history of some million steps


class Experiment:
    """One run.

    Args:
        name: an experiment, branch, tag or commit; empty for the work tree.

    Raises `PipelineError` for a name that neither git nor DVC knows.
    """

    def __init__(self, name: str = "") -> None:
        self.name, self._files = name or HERE, _files_at(name) if name else None
        self.commit = str(self._files.repo.get_rev())[:12] if self._files is not None else _head()
        self.metrics = {stage: self._figures(stage) for stage in STAGES}
        self.scores = {stage: self.json(f"results/{stage}/scores.json", Scores) for stage in TRAINED}
        text = self.read("params.yaml")
        self.sections = _yaml(text, f"params.yaml of {self.name}") if text is not None else {}
        self.params = flat(self.sections)

    def open(self, path: str) -> BinaryIO | None:
        """A file to read and seek in; None where the run has none.

        Raises `PipelineError` where DVC knows it and the cache of this checkout does not hold it.
        """
        try:
            return Path(path).open("rb") if self._files is None else self._files.open(path, "rb")
        except (FileNotFoundError, NotADirectoryError, KeyError):
            if self._files is not None and self._lists(path):
                raise PipelineError(
                    "not in DVC's cache", where=f"{path} of {self.name}", remedy=self._remedy(), code=ARTEFACT
                ) from None
            return None
        except Exception as error:  # DVC's own are many
            raise PipelineError(
                f"cannot be read: {brief(error)}", where=f"{path} of {self.name}", remedy=self._remedy(), code=ARTEFACT
            ) from None

    def read(self, path: str) -> bytes | None:
        """The bytes of a file; None where the run has none."""
        file = self.open(path)
        if file is None:
            return None
        with file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise PipelineError(f"more than {MAX_TEXT:,} bytes", where=f"{path} of {self.name}", code=ARTEFACT)
        return data

    def json(self, path: str, shape: type[BaseModel] | None = None) -> dict[str, Any]:
        """The object in a JSON file; empty where the run has none. Raises `PipelineError` for what is not of its shape."""
        file = self.open(path)
        if file is None:
            return {}
        told = {"where": f"{path} of {self.name}", "remedy": self._remedy()}
        with file:
            found = read_object(file, **told)
        return shaped(found, shape, **told) if shape else found

    def _figures(self, stage: str) -> dict[str, Any]:
        """A stage's figures, with what the run took where this checkout knows it."""
        path = f"metrics/{stage}.json"
        return self.json(path, Metrics) | costs_of(self.read(path))

    def _lists(self, path: str) -> bool:
        try:
            return bool(self._files is not None and self._files.exists(path))
        except Exception as error:  # DVC's own are many
            what = f"cannot be looked up: {brief(error)}"
            raise PipelineError(what, where=f"{path} of {self.name}", remedy=self._remedy(), code=ARTEFACT) from None

    def _remedy(self) -> str:
        return "dvc repro" if self._files is None else f"dvc exp apply {self.name} && dvc repro, or dvc fetch"


def _files_at(name: str) -> Any:
    from dvc.api import DVCFileSystem

    try:
        files = DVCFileSystem(rev=name)
        files.repo.get_rev()
    except Exception as error:  # DVC's own are many
        remedy = "dvc exp show, dvc exp list and git log name them"
        raise PipelineError(f"no such experiment: {brief(error)}", where=name, remedy=remedy) from None
    return files


def _head() -> str:
    """The commit that the work tree stands on; empty where there is no git."""
    found = _git("rev-parse", "--short=12", "--verify", "HEAD")
    return found.decode().strip() if found else ""


def _git(*arguments: str) -> bytes | None:
    """What git says; None where it is not there or says no."""
    try:
        made = subprocess.run(["git", *arguments], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return made.stdout if made.returncode == 0 else None


def committed_params() -> dict[str, Any]:
    """The keys of params.yaml in git's last commit; empty where there is none."""
    data = _git("show", "HEAD:./params.yaml")
    return {} if data is None else flat(_yaml(data, "params.yaml of HEAD"))


def _yaml(data: bytes, where: str) -> Any:
    try:
        return parse(data.decode("utf-8-sig"))
    except Exception as error:  # the parser's own are many
        raise PipelineError(f"cannot be read: {brief(error)}", where=where, code=ARTEFACT) from None


def flat(content: Any, before: str = "") -> dict[str, Any]:
    """Nested sections as one level: `pretrain.lr` and so on."""
    if not isinstance(content, dict) or not content:
        return {before: content} if before else {}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{before}.{key}" if before else str(key))
    return found
