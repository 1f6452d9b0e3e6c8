"""Folders of models as dependencies in dvc.yaml: DVC must see a change of their files, and only hub ids need no entry."""

from pathlib import Path
from typing import Any

STAGES = {"vision": ("extract", "pretrain", "sft"), "llm": ("tokenize", "pretrain", "sft")}


def list_model_folders(params: Any, dvc: Any, before: dict[str, str]) -> None:
    """Put the folders that `vision.model` and `llm.model` name into the deps of the stages that read them.

    `before` has the folders that stood there for each section; they are taken out of those stages.
    """
    for section, stages in STAGES.items():
        old, new = before[section], str(params[section]["model"])
        for stage in stages:
            deps = dvc["stages"][stage]["deps"]
            place = deps.index(old) if old in deps else None
            kept_for_other = any(
                str(params[other]["model"]) == old for other in STAGES if other != section and stage in STAGES[other]
            )
            if place is not None and old != new and not kept_for_other:
                del deps[place]
            if Path(new).is_dir() and new not in deps:
                deps.insert(_place(deps) if place is None else place, new)


def _place(deps: Any) -> int:
    """Before the stage's own code."""
    return next((number for number, dep in enumerate(deps) if str(dep).startswith("stages/")), len(deps))
