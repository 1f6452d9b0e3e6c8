"""Folders of models as dependencies in dvc.yaml: DVC must see a change of their files, and only hub ids need no entry."""

from pathlib import Path
from typing import Any

STAGES = {"vision": ("extract", "pretrain", "sft"), "llm": ("tokenize", "pretrain", "sft")}


def list_model_folders(params: Any, dvc: Any, before: dict[str, Any]) -> None:
    """Put the folders that `vision.model` and `llm.model` name into the deps of the stages that read them.

    `before` has what `model` of each section named; folders of it are taken out of those stages.
    """
    for section, stages in STAGES.items():
        earlier, new = models_of(before[section]), models_of(params[section]["model"])
        for stage in stages:
            deps = dvc["stages"][stage]["deps"]
            place = next((deps.index(old) for old in earlier if old in deps), None)
            others = [
                model
                for other in STAGES
                if other != section and stage in STAGES[other]
                for model in models_of(params[other]["model"])
            ]
            for old in earlier:
                if old in deps and old not in (*new, *others):
                    del deps[deps.index(old)]
            for model in reversed([model for model in new if Path(model).is_dir() and model not in deps]):
                deps.insert(_place(deps) if place is None else place, model)


def models_of(named: Any) -> list[str]:
    """What a section's `model` names: one, or a list."""
    return [str(model) for model in named] if isinstance(named, list) else [str(named)]


def _place(deps: Any) -> int:
    """Before the stage's own code."""
    return next((number for number, dep in enumerate(deps) if str(dep).startswith("stages/")), len(deps))
