"""A params file read, checked and changed: ruamel, YAML 1.2, since PyYAML would read `1e-05` as text."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core import PipelineError, brief
from pipeline.params.schema import Params, Section, Vision, keys_of

S = TypeVar("S", bound=Section)

MAX_BYTES, MAX_NODES = 1 << 16, 20_000
MAX_BRACKETS = 1000  # the parser takes time by the square of how deep they stand


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top is a mapping; raises `PipelineError` naming file, line and column."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PipelineError(f"more than {MAX_BYTES:,} bytes, which no file of parameters needs", where=str(path))
        content = parse(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise PipelineError("not found", where=str(path), remedy="run from the project's root folder") from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start:,}"
        raise PipelineError(what, where=str(path), remedy="save it as UTF-8") from None
    except OSError as error:
        raise PipelineError(f"cannot be read: {error.strerror or brief(error)}", where=str(path)) from None
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        spot = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise PipelineError(brief(getattr(error, "problem", None) or error), where=f"{path}{spot}") from None
    if not isinstance(content, dict):
        raise PipelineError("expected sections of keys", where=str(path))
    return content


def parse(text: str) -> Any:
    """The content of a YAML text, whose aliases may not make more of it than `MAX_NODES` values; raises YAMLError or ValueError."""
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise ValueError(f"more than {MAX_BRACKETS:,} brackets")
    _count(YAML(typ="safe", pure=True).compose(text), {})
    content = YAML(typ="safe", pure=True).load(text)
    _require_text(content, "")
    return content


def _count(node: Any, known: dict[int, int]) -> int:
    """How many values a node is when every alias is written out."""
    if (found := known.get(id(node))) is not None:
        if not found:
            raise ValueError("an alias within what it stands for")
        return found
    known[id(node)] = 0
    parts = node.value if isinstance(getattr(node, "value", None), list) else []
    known[id(node)] = 1 + sum(_count(part, known) for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,)))
    if known[id(node)] > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES:,} values, its aliases written out")
    return known[id(node)]


def _require_text(content: Any, key: str) -> None:
    """Raises ValueError for a text that no file and no tokenizer takes: with a NUL or half a surrogate pair in it."""
    if isinstance(content, dict):
        for name, value in content.items():
            _require_text(name, key)
            _require_text(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            _require_text(value, key)
    elif isinstance(content, str) and ("\0" in content or content.encode("utf-8", "replace").decode() != content):
        raise ValueError(f"{key}: {content!r:.60} is no text")


def check(content: dict[str, Any], *, where: str) -> Params:
    """Validate the content of a params file; raises `PipelineError` naming the first wrong key."""
    params = validated(Params, content, where=where)
    _require_whole_members(params.vision, where)
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


def validated(schema: type[S], content: dict[str, Any], *, where: str) -> S:
    """The content as its schema has it; raises `PipelineError` naming the first wrong key."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise _explain(error, where) from None


def _require_whole_members(vision: Vision, where: str) -> None:
    """Raises `PipelineError` unless every encoder has its values, and none stands there twice."""
    models = len(vision.model) if isinstance(vision.model, list) else 0
    if models == 1 or vision.model == []:
        raise PipelineError(f"vision.model is a list of {models}", where=where, remedy="name one encoder, or several to join")
    for key in ("revision", "layer", "pool"):
        value = getattr(vision, key)
        if isinstance(value, list) and len(value) != models:
            named = f"{models} encoders" if models else "one encoder, not a list"
            problem = f"vision.{key} is a list of {len(value)}, but vision.model names {named}"
            raise PipelineError(problem, where=where, remedy=f"give vision.{key} one value for all, or one for each encoder")
    members = [(each.model, each.revision, each.layer) for each in vision.members]
    if twice := next((each for each in members if members.count(each) > 1), None):
        problem = f"vision.model names {twice[0]} twice with the same layer"
        raise PipelineError(problem, where=where, remedy="name it once, or give vision.layer a list with another layer for each")


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
    return PipelineError(f"{key}: {message}, got {_shown(problem['input'])}{more}", where=where)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


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
            target[name] = parse(value)
        except (YAMLError, ValueError, RecursionError) as error:
            raise PipelineError(f"{key}: {brief(getattr(error, 'problem', None) or error)}", where="command line") from None
