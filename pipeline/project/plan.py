"""What a user's rows and pictures make of params.yaml, with the reason of each decision."""

import shlex
import zipfile
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from pipeline.check import Report
from pipeline.core import BAD_ROWS, PipelineError
from pipeline.project.columns import as_option
from pipeline.project.files import in_params
from pipeline.records import BadRow, Digests, Record, Split

SHEETS = (".xlsx", ".xls", ".ods", ".numbers")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ENOUGH = 1_000  # held-out pictures that say what there is to say
LEAST = 20  # held-out pictures below which a figure says little
STEPS = 150  # optimiser steps below which a small data set is gone through more often, in smaller batches
LEAST_EPOCH = 24  # steps of an epoch that such batches are for, down to SMALLEST rows each
SMALLEST = 4
MOST_EPOCHS = 20
FEW_ROWS, SEEDS = 200, 100  # rows that are dealt out by a chosen seed, and how many are tried


@dataclass(slots=True)
class Plan:
    """Values for sections of params.yaml, and why."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)  # of pretrain, sft and heldout


def find_records(pictures: Path, given: list[Path]) -> list[Path]:
    """The rows: what was given, else the one table within the folder of pictures, else the folder itself."""
    for path in [*given, pictures]:
        if not path.exists():
            raise PipelineError("no such file or folder", where=str(path), remedy="give the folder of your pictures, and --records")
        if path.suffix.lower() in SHEETS:
            raise _spreadsheet(path)
    if given:
        return given
    if pictures.is_file():
        if zipfile.is_zipfile(pictures):
            remedy = f"glance new {shlex.quote(str(pictures))} --records captions.csv"
            raise PipelineError("a zip of pictures: its captions are a file of their own", where=str(pictures), remedy=remedy)
        return [pictures]
    tables = sorted(path for path in pictures.iterdir() if path.suffix.lower() in TABLES and path.is_file())
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise PipelineError(f"holds several tables: {names}", where=str(pictures), remedy="name those to take with --records")
    if not tables and (sheet := next((path for path in sorted(pictures.iterdir()) if path.suffix.lower() in SHEETS), None)):
        raise _spreadsheet(sheet)
    return tables or [pictures]


def _spreadsheet(path: Path) -> PipelineError:
    return PipelineError("a spreadsheet, which is not read", where=str(path), remedy=f"save it as {path.stem}.csv (CSV UTF-8)")


def make_plan(reports: list[Report], pictures: Path, trainings: dict[str, Any], columns: dict[str, str] | None = None) -> Plan:
    """Data sections, epochs and batch sizes for one or two files of rows.

    Captions go to pretrain and conversations to sft where there are both; of one kind alone, both stages take all rows.

    Args:
        trainings: the sections `pretrain` and `sft` of params.yaml as they are.
        columns: names that rows give to their parts.

    Raises `PipelineError` for files that hold no good row, and for more of a kind than one.
    """
    plan = Plan()
    captions = [report for report in reports if not report.asking]
    talks = [report for report in reports if report.asking]
    for kind, found in (("captions", captions), ("conversations", talks)):
        if len(found) > 1:
            names = " and ".join(report.subject.records for report in found)
            remedy = "put them in one folder and name that, or use data.X.mix (docs/your-data.md)"
            raise PipelineError(f"{names} both hold {kind}", where="--records", remedy=remedy)
    for report in reports:
        if not report.good:
            raise _unusable(report)
    first, second = (captions or talks)[0], (talks or captions)[0]
    if len(second.pictures.contents) == 1 or second.good == 1:
        remedy = "bring a second one at least; a model that learns something from them takes hundreds"
        raise PipelineError(
            "one usable picture: none is left to measure on", where=second.subject.records, remedy=remedy, code=BAD_ROWS
        )
    for name, report in (("pretrain", first), ("sft", second), ("heldout", second)):
        plan.reports[name] = report
        plan.sections[f"data.{name}"] = {"records": in_params(Path(report.subject.records)), "images": in_params(pictures)}
        if columns:
            plan.sections[f"data.{name}"]["columns"] = dict(columns)
    plan.reasons.append(_why_rows(first, second))
    if not second.asking:  # a model that is asked needs a question to have learnt from
        plan.sections["data.sft"]["prompt"] = plan.sections["data.heldout"]["prompt"] = "<image>\nDescribe the picture."
        plan.reasons.append('sft asks "Describe the picture." of every caption, so that the model can be asked')
    share = _share(plan, len(second.pictures.contents), second.good)
    plan.sections["data.heldout"]["share"] = share
    if second.good < FEW_ROWS and (seed := _seed(second, share)):
        plan.sections["data.heldout"]["seed"] = seed
    if bad := sum(report.bad.count for report in reports):
        plan.sections["data"] = {"on_error": "skip", "max_bad_share": round(min(1.0, 1.5 * bad / sum(r.rows for r in reports)), 3)}
        plan.reasons.append(f"{bad:,} rows cannot be used: data.on_error is skip, which lists them in data/tokens")
    for name, report in (("pretrain", first), ("sft", second)):
        _plan_training(plan, name, report, share, trainings[name])
    return plan


def _unusable(report: Report) -> PipelineError:
    """Of a file without a good row: why the first one is bad, and what mends it."""
    file, first = report.subject.records, next(iter(report.bad.first), None)
    if first is None:
        return PipelineError("holds no rows", where=file, remedy="name the file of your captions with --records", code=BAD_ROWS)
    what, remedy = f"no row can be used; the first, {first.where}: {first.reason}", first.remedy
    if Path(file).is_dir():
        remedy = "put captions.csv into it (file_name,caption), or a .txt beside each picture, or name a file with --records"
    return as_option(PipelineError(what, where=file, remedy=remedy, code=BAD_ROWS))


def _why_rows(first: Report, second: Report) -> str:
    if first is not second:
        return "captions train the projector (data.pretrain), conversations the whole model (data.sft)"
    kind = "conversations" if first.asking else "captions"
    return f"there are only {kind}, so both stages train on them: first the projector alone, then the whole model"


def _share(plan: Plan, pictures: int, rows: int) -> float:
    """How many pictures to hold out: a fifth of few, at most about a thousand."""
    basis = pictures or rows
    share = 0.2 if basis < 10 * LEAST else max(0.01, round(min(0.1, ENOUGH / basis), 3))
    plan.reasons.append(
        f"about {round(basis * share):,} of {basis:,} pictures are held out (share {share:g}): nobody trains on them"
    )
    if basis * share < LEAST:
        plan.reasons.append(
            f"fewer than {LEAST} held-out pictures say little about a model: collect more before you trust a figure"
        )
    return share


def _seed(report: Report, share: float) -> int:
    """The first seed that deals out about that share of so few rows: by chance alone there may be none to measure on."""
    source = report.subject.source
    rows = [row for row in source.records() if not isinstance(row, BadRow)]
    digest_of, wanted = Digests(source.images), max(1, round(len(rows) * share))
    for tried in range(SEEDS):
        split = Split(digest_of, share=share, seed=tried)
        if abs(sum(_side(split, row) == "heldout" for row in rows) - wanted) <= wanted // 10:
            return tried
    return 0


def _side(split: Split, row: Record) -> str | None:
    try:
        return split.side(row)
    except PipelineError:  # a picture that cannot be read: nobody uses its row
        return None


def _plan_training(plan: Plan, name: str, report: Report, share: float, training: Any) -> None:
    """Smaller batches and more epochs where there are few rows; what is there for many stays."""
    rows, batch, epochs = max(1, round(report.good * (1 - share))), int(training["batch_size"]), int(training["epochs"])
    if ceil(rows / batch) * epochs < STEPS:
        batch = max(min(SMALLEST, batch), min(batch, rows // LEAST_EPOCH))
        epochs = min(MOST_EPOCHS, max(epochs, ceil(STEPS / ceil(rows / batch))))
        plan.sections[name] = {"batch_size": batch, "epochs": epochs}
        plan.reasons.append(f"{name}: {rows:,} rows are few, so {epochs} times over in batches of {batch}")
