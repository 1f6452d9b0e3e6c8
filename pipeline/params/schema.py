"""What params.yaml may hold: every key is required and checked, so a default lives in params.yaml only."""

from collections.abc import Callable, Iterator
from datetime import date
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

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


def _auto_or_at_least(least: int) -> PlainValidator:
    def check(value: Any) -> Any:
        if value == "auto" or (type(value) is int and value >= least):  # true is no number
            return value
        raise ValueError(f"expected a number of at least {least}, or auto")

    return PlainValidator(check)


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
Unplaced = Literal["refuse", "first"]
Links = Literal["follow", "refuse"]


class Columns(Section):
    """Under which keys or columns rows keep their parts; "" = the usual ones. `ignore`: keys, or patterns, that say nothing."""

    turns: str = ""
    images: str = ""
    text: str = ""
    question: str = ""
    answer: str = ""
    system: str = ""
    ignore: list[str] = Field(default_factory=list)


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
    columns: Columns = Field(default_factory=Columns)
    prompt: str = "<image>"
    unplaced: Unplaced = "refuse"
    links: Links = "follow"
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


def _for_each(kind: type, expected: str, fits: Callable[[Any], bool] = lambda _: True) -> PlainValidator:
    """A value, or a list of values, one for each encoder."""

    def check(value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        if not all(type(one) is kind and fits(one) for one in values):  # true is no number
            raise ValueError(f"expected {expected}, or a list of them, one for each encoder")
        return value

    return PlainValidator(check)


class Vision(Section):
    """`model` may be a list: encoders whose features are joined in the channel. `revision`, `layer` and `pool` hold for each of
    them, or are lists as long."""

    model: Annotated[str | list[str], _for_each(str, "a folder or hub id", bool)]
    revision: Annotated[str | list[str], _for_each(str, "a text")]
    layer: Annotated[int | list[int], _for_each(int, "a whole number")]
    precision: Precision
    storage: Literal["float16", "int8"]
    pool: Annotated[int | list[int], _for_each(int, "a number from 1 to 4", lambda pool: 1 <= pool <= 4)]
    shard_rows: Positive

    @property
    def members(self) -> list["Member"]:
        """What is said of each encoder, in the order in which their channels stand."""
        keys = {key: getattr(self, key) for key in Member._fields}
        count = len(self.model) if isinstance(self.model, list) else 1
        each = {key: value if isinstance(value, list) else [value] * count for key, value in keys.items()}
        return [Member(**{key: values[number] for key, values in each.items()}) for number in range(count)]


class Member(NamedTuple):
    """One encoder of `Vision`."""

    model: str
    revision: str
    layer: int
    precision: Precision
    storage: Literal["float16", "int8"]
    pool: int


def _date(value: Any) -> Any:
    """A date as YAML reads one, or as text; its spelling YYYY-MM-DD."""
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            value = None
    if type(value) is not date:
        raise ValueError("expected a date such as '2024-07-26'")
    return value.isoformat()


class LanguageModel(Section):
    model: Annotated[str, Field(min_length=1)]
    revision: str
    image_token: Annotated[str, Field(min_length=1)]
    date: Annotated[str, PlainValidator(_date)]


class Tokenize(Section):
    max_tokens: Positive
    too_long: Literal["cut", "skip", "stop"]


class Projector(Section):
    kind: Literal["linear", "linear_nobias", "mlp", "mlp3x", "norm_mlp"]
    merge: Literal["none", "shuffle", "pool"]
    factor: Annotated[int, Field(ge=1, le=4)]


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


METRICS = ("exact", "vqa", "contains", "token_f1", "anls", "rouge_l", "cider", "yes_no", "choice")


def _metrics(value: Any) -> Any:
    if value == "auto":
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("expected auto, or a list of metrics")
    if unknown := [name for name in value if name not in METRICS]:
        raise ValueError(f"no metric {unknown[0]!r}, expected auto or some of {', '.join(METRICS)}")
    return list(dict.fromkeys(value))


class Evaluate(Section):
    limit: Count
    metrics: Annotated[list[str] | Literal["auto"], PlainValidator(_metrics)]
    max_new_tokens: Positive
    every: Count


Tracker = Literal["none", "tensorboard", "trackio", "mlflow", "wandb", "dvclive"]


class Runtime(Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")]
    processes: Positive
    fsdp: bool
    compile: bool
    workers: Annotated[int | Literal["auto"], _auto_or_at_least(0)]
    tokenize_workers: Positive
    extract_batch: Annotated[int | Literal["auto"], _auto_or_at_least(1)]
    feature_stores: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    live_cache_mb: Count
    save_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    eval_batch: Positive
    track: Tracker
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


def keys_of(section: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
