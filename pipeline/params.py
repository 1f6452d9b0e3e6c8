"""params.yaml -> frozen, checked dataclasses; the only place that knows the file.

Reads params.yaml (ruamel, YAML 1.2: PyYAML would read `1e-05` as text) and dvc.yaml. Every key is required and
checked, so a default lives in params.yaml only. A stage gets a view of just the keys that dvc.yaml lists for it.
Run as `python -m pipeline.params [key=value ...]` to check the file with some keys changed.
"""

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import PipelineError, brief, exit_on_error

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Train = Literal["projector", "projector+ends", "all"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _switch(value: Any) -> Any:
    if value is not True and value is not False and value != "auto":  # 1 equals True
        raise ValueError("expected true, false or auto")
    return value


Switch = Annotated[bool | Literal["auto"], PlainValidator(_switch)]


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, no coercion ("1" is not 1, true is not 1), immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _below(path: str) -> str:
    """A path that DVC watches because it watches the folder above."""
    if not path or path.startswith(("/", "~")) or ".." in PurePosixPath(path).parts:
        raise ValueError("expected a path below the data set's own, without ..")
    return path


def _weighted(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"weight": value}
    if not isinstance(value, dict | Part):
        raise ValueError("expected a weight, or a section with one")
    return value


Below = Annotated[str, AfterValidator(_below)]
Format = Literal["auto", "jsonl", "json", "csv", "parquet", "arrow", "webdataset", "folder", "hub"]
Columns = dict[Literal["turns", "images", "text"], str]
Unplaced = Literal["refuse", "first"]


class Part(Section):
    """Some files of a data set, how often each of their rows is taken, and what differs from the data set's other files."""

    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    images: Below | None = None
    format: Format | None = None
    columns: Columns | None = None
    prompt: str | None = None
    unplaced: Unplaced | None = None


class Dataset(Section):
    """`records` and `images` must be given; the rest is for data that do not speak for themselves (docs/your-data.md).

    `mix` says which files below the folder `records` are read, by pattern; without it `records` is read itself.
    """

    records: Annotated[str, Field(min_length=1)]
    images: Annotated[str, Field(min_length=1)]
    mix: Annotated[dict[Below, Annotated[Part, BeforeValidator(_weighted)]], Field(min_length=1)] | None = None
    format: Format = "auto"
    columns: Columns = Field(default_factory=dict)
    prompt: str = "<image>"
    unplaced: Unplaced = "refuse"
    seed: Count = 0


class HeldOut(Dataset):
    """`share` 0: all its rows are held out. Else those whose pictures fall in a seeded share, and nobody trains on those."""

    share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Data(Section):
    pretrain: Dataset
    sft: Dataset
    heldout: HeldOut
    limit: Count
    on_error: Literal["stop", "skip"]
    max_bad_share: Share


class Vision(Section):
    model: Annotated[str, Field(min_length=1)]
    revision: str
    layer: int
    precision: Precision
    storage: Literal["float16", "int8"]
    shard_rows: Positive


class LanguageModel(Section):
    model: Annotated[str, Field(min_length=1)]
    revision: str
    image_token: Annotated[str, Field(min_length=1)]


class Tokenize(Section):
    max_tokens: Positive
    too_long: Literal["cut", "skip", "stop"]


class Projector(Section):
    kind: Literal["linear", "mlp", "norm_mlp"]


class Training(Section):
    train: Train
    features: Literal["stored", "live"]
    share_images: Switch
    epochs: Positive
    batch_size: Positive
    micro_tokens: Positive
    lr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    warmup: Share
    min_lr: Share
    weight_decay: Share
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    precision: Precision
    seed: Count
    keep: Literal["last", "best"]


class Tuning(Training):
    start: Annotated[str, Field(min_length=1)]


class Evaluate(Section):
    limit: Count
    max_new_tokens: Positive
    every: Count


class Runtime(Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")]
    processes: Positive
    divided: bool
    compile: bool
    workers: Count
    tokenize_workers: Positive
    extract_batch: Positive
    feature_stores: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    live_cache_mb: Count
    save_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    eval_batch: Positive
    live: bool
    profile: Count


class Params(Section):
    """The whole of params.yaml."""

    data: Data
    vision: Vision
    llm: LanguageModel
    tokenize: Tokenize
    projector: Projector
    pretrain: Training
    sft: Tuning
    evaluate: Evaluate
    runtime: Runtime


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


def keys_of(section: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


def check(content: dict[str, Any], *, where: str) -> Params:
    """Validate the content of a params file; raises `PipelineError` naming the first wrong key."""
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise _explain(error, where) from None
    if params.vision.precision == "float16" and params.runtime.device == "cpu":
        raise PipelineError("vision.precision float16 needs a GPU", where=where, remedy="use auto")
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


def main() -> None:
    content = read_yaml(Path("params.yaml"))
    override(content, sys.argv[1:])
    check(content, where="params.yaml")
    print(f"params.yaml: {sum(1 for _ in keys_of())} keys, all valid")


if __name__ == "__main__":
    exit_on_error(main)
