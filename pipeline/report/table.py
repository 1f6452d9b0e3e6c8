"""What the last run gave, on the terminal: the table of `make demo`, from metrics/*.json."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.core import ARTEFACT, PipelineError, costs_of
from pipeline.report.hints import hints
from pipeline.report.shapes import Metrics, read_object, shaped

STAGES = ("extract", "tokenize", "pretrain", "sft")
TOLD = {"extract": ("cache_mb", "images"), "sft": ("questions", "accuracy", "accuracy_blind", "loss")}
TOLD["pretrain"] = TOLD["sft"][1:]


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of each stage; raises `PipelineError` naming the stage that has none."""
    found = {}
    for stage in STAGES:
        path = folder / f"{stage}.json"
        try:
            with path.open("rb") as file:
                figures = shaped(read_object(file, where=str(path)), Metrics, where=str(path))
            found[stage] = figures | costs_of(path.read_bytes())
        except OSError:
            raise PipelineError("no figures yet", where=str(path), remedy="dvc repro", code=ARTEFACT) from None
        if figures.get("diverged"):
            remedy = f"lower {stage}.lr, then dvc repro"
            raise PipelineError("the last run has diverged, and left no model", where=str(path), remedy=remedy, code=ARTEFACT)
        if lacking := [name for name in TOLD.get(stage, ()) if figures.get(name) is None]:
            raise PipelineError(f"has no {lacking[0]}", where=str(path), remedy=f"dvc repro -f -s {stage}", code=ARTEFACT)
    return found


def tables(found: dict[str, dict[str, Any]]) -> list[Table]:
    """The held-out results and what each stage cost."""
    pretrain, sft, extract = found["pretrain"], found["sft"], found["extract"]
    results = Table()
    results.add_column(f"{sft['questions']:,} held-out questions, exact match")
    for column in ("accuracy", "loss"):
        results.add_column(column, justify="right")
    for name, accuracy, loss in (
        ("blind: image features zeroed", f"{max(pretrain['accuracy_blind'], sft['accuracy_blind']):.2%}", ""),
        ("projector only", f"{pretrain['accuracy']:.2%}", f"{pretrain['loss']:.4f}"),
        ("after SFT", f"{sft['accuracy']:.2%}", f"{sft['loss']:.4f}"),
    ):
        results.add_row(name, accuracy, loss)
    costs = Table()
    costs.add_column(f"feature cache: {extract['cache_mb']:,.1f} MB for {extract['images']:,} images")
    for column in ("seconds", "peak memory, GB"):
        costs.add_column(column, justify="right")
    for stage in STAGES:
        spent = [(found[stage].get("seconds"), ".1f"), (found[stage].get("peak_memory_gb"), ".2f")]
        costs.add_row(stage, *("–" if value is None else format(value, form) for value, form in spent))
    return [results, costs]


def show_table() -> None:
    """Print it, and what to try."""
    console = Console(width=100)
    for table in tables(read_metrics(Path("metrics"))):
        console.print(table)
    for line in hints():
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
