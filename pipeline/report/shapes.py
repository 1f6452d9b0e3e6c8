"""The JSON files of a run, read within bounds and held to what the page and the table make of them.

Any other key may stand there too: a file of another version is read as far as it goes.
"""

import json
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core import ARTEFACT, PipelineError, brief

MAX_JSON = 64 << 20  # bytes: a megabyte of `[]` is 24 of memory
REMEDY = "dvc checkout, else dvc repro"
Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Rows(_Open):
    rows: Count = 0
    tokens: Count = 0


class Metrics(_Open):
    """metrics/STAGE.json, with what the run took."""

    accuracy: Number | None = None
    accuracy_low: Number | None = None
    accuracy_high: Number | None = None
    accuracy_blind: Number | None = None
    loss: Number | None = None
    train_loss: Number | None = None
    questions: Count | None = None
    steps: Count | None = None
    images: Count | None = None
    cache_mb: Number | None = None
    seconds: Number | None = None
    peak_memory_gb: Number | None = None
    diverged: bool = False
    pretrain: _Rows | None = None
    sft: _Rows | None = None
    heldout: _Rows | None = None


class _Measured(_Open):
    mean: Number | None = None
    low: Number | None = None
    high: Number | None = None
    blind: Number | None = None
    questions: Count = 0
    yes_share: Number = 0.0
    yes_share_reference: Number = 0.0


class Scores(_Open):
    """results/STAGE/scores.json."""

    by: Text = "exact"
    exact: _Measured | None = None
    metrics: dict[str, _Measured | Number | None] | None = None
    perplexity: Number | None = None
    types: dict[str, _Measured] | None = None
    turns: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], _Measured] | None = None
    sources: dict[str, _Measured] | None = None
    warnings: list[Text] = []


def read_object(file: BinaryIO, *, where: str, remedy: str = REMEDY) -> dict[str, Any]:
    """The object in a JSON file; raises `PipelineError` for what is no object, or more than `MAX_JSON`."""
    data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise PipelineError(f"more than {MAX_JSON:,} bytes", where=where, remedy=remedy, code=ARTEFACT)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PipelineError("not a JSON object", where=where, remedy=remedy, code=ARTEFACT)
    return found


def shaped(found: dict[str, Any], shape: type[BaseModel], *, where: str, remedy: str = REMEDY) -> dict[str, Any]:
    """The same; raises `PipelineError` naming the first value that is not what a stage writes."""
    try:
        shape.model_validate(found)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        got = brief(ValueError(repr(problem["input"])))[:60]
        raise PipelineError(f"not what a stage writes: {key} is {got}", where=where, remedy=remedy, code=ARTEFACT) from None
    return found
