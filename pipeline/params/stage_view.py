"""One stage's part of params.yaml: what dvc.yaml lists for it, and `runtime`."""

from pathlib import Path
from typing import Any

from pipeline.core import PipelineError
from pipeline.params.reading import _nearest, load, read_yaml
from pipeline.params.schema import Section, keys_of


class StageParams:
    """The keys of params.yaml that dvc.yaml lists for one stage; reading another one is an error.

    An undeclared read would make `dvc repro` skip a stage whose result has changed.
    """

    def __init__(self, values: Section, declared: frozenset[str], stage: str, prefix: str = "") -> None:
        self._values, self._declared, self._stage, self._prefix = values, declared, stage, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._values, name)
        key = f"{self._prefix}{name}"
        parts = key.split(".")
        if any(".".join(parts[: i + 1]) in self._declared for i in range(len(parts))):
            return value
        if any(declared.startswith(f"{key}.") for declared in self._declared):
            return StageParams(value, self._declared, self._stage, f"{key}.")
        raise PipelineError(
            f"stage {self._stage} reads {key}, which is not listed for it",
            where="dvc.yaml",
            remedy=f"add {key} to stages.{self._stage}.params",
        )


def load_for_stage(stage: str, root: Path = Path()) -> StageParams:
    """The whole file checked, then narrowed to what dvc.yaml lists for `stage` (plus `runtime`)."""
    params = load(root / "params.yaml")
    stages = read_yaml(root / "dvc.yaml").get("stages", {})
    if stage not in stages:
        raise PipelineError(f"no stage {stage}", where="dvc.yaml", remedy=f"stages are: {', '.join(stages)}")
    declared = frozenset(str(key) for key in stages[stage].get("params", []))
    if unknown := sorted(declared - set(keys_of())):
        raise PipelineError(f"unknown param {unknown[0]}", where=f"dvc.yaml: {stage}", remedy=_nearest(unknown[0]))
    return StageParams(params, declared | {"runtime"}, stage)
