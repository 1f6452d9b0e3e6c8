"""A params file read, checked and changed: ruamel, YAML 1.2, since PyYAML would read `1e-05` as text."""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core import PipelineError, brief
from pipeline.params.schema import (
    Params,
    keys_of,
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top is a mapping; raises `PipelineError` naming file, line and column."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError("not found", where=str(path), remedy="run from the project's root folder") from None
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        spot = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise PipelineError(brief(getattr(error, "problem", None) or error), where=f"{path}{spot}") from None
    if not isinstance(content, dict):
        raise PipelineError("expected sections of keys", where=str(path))
    return content


def check(content: dict[str, Any], *, where: str) -> Params:
    """Validate the content of a params file; raises `PipelineError` naming the first wrong key."""
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise _explain(error, where) from None
    if params.vision.precision == "float16" and params.runtime.device == "cpu":
        raise PipelineError("vision.precision float16 needs a GPU", where=where, remedy="use auto")
    if params.projector.merge == "none" and params.projector.factor > 1:
        problem = f"projector.factor is {params.projector.factor}, but projector.merge is none"
        raise PipelineError(problem, where=where, remedy="set projector.merge: shuffle or pool")
    for name, stage in (("pretrain", params.pretrain), ("sft", params.sft)):
        if stage.keep == "best" and not params.evaluate.every:
            remedy = "set evaluate.every: the steps between two held-out losses"
            raise PipelineError(f"{name}.keep is best, but held-out loss is measured at the end only", where=where, remedy=remedy)
    return params


def _explain(error: ValidationError, where: str) -> PipelineError:
    """The first problem in one line; an unknown key comes first, since a misspelling also leaves one missing."""
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    key = ".".join(str(part) for part in problem["loc"]).removesuffix(".[key]")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return PipelineError(f"unknown key {key}{more}", where=where, remedy=_nearest(key))
    if problem["type"] == "missing":
        return PipelineError(f"key {key} is missing{more}", where=where, remedy="every key must be given")
    message = problem["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return PipelineError(f"{key}: {message}, got {problem['input']!r}{more}", where=where)


def _nearest(key: str) -> str:
    matches = difflib.get_close_matches(key, list(keys_of()), n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else "remove it"


def load(path: Path = Path("params.yaml")) -> Params:
    """The checked content of params.yaml."""
    return check(read_yaml(path), where=str(path))


def override(content: dict[str, Any], assignments: list[str]) -> None:
    """Apply `key=value` texts to the content of a params file, as `dvc exp run -S` would."""
    known = set(keys_of())
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise PipelineError(f"expected key=value, got {text!r}", where="command line")
        if key not in known:
            raise PipelineError(f"unknown key {key}", where="command line", remedy=_nearest(key))
        *sections, name = key.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise PipelineError(f"{section} is no section", where="command line")
        try:
            target[name] = YAML(typ="safe", pure=True).load(value)
        except (YAMLError, ValueError, RecursionError) as error:
            raise PipelineError(f"{key}: {brief(getattr(error, 'problem', None) or error)}", where="command line") from None
