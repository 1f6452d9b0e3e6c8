"""The command `python -m pipeline.check`: data sets opened, surveyed one after the other, told and judged."""

import glob
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from tqdm import tqdm

from pipeline.check.costs import Rate, Shape, context_of, encoder_shape, extraction_rate
from pipeline.check.facts import Model, cost
from pipeline.check.page import write_page
from pipeline.check.preflight import preflight
from pipeline.check.survey import Report, Settings, Subject, survey
from pipeline.check.terminal import clean, open_console, show
from pipeline.check.training import make_part, training_costs
from pipeline.core import BAD_ROWS, PipelineError, enter_project, exit_on_error, make_folder, merged_tokens, quiet_libraries
from pipeline.params import Dataset, Params, load
from pipeline.records import Source, SourceSpec, no_pictures, open_dataset
from pipeline.text import PromptBuilder

SETS = ("pretrain", "sft", "heldout")
EXTRACTED = ("pretrain", "heldout")  # what the stage extract reads
EXAMPLES = 12

app = typer.Typer(add_completion=False)


@app.command()
def check(
    data: Annotated[
        list[str] | None, typer.Argument(help="Files, folders or quoted globs, a data set each. Without: those of params.yaml.")
    ] = None,
    images: Annotated[str, typer.Option(help="Folder or zip of the pictures that rows name. Without: beside the rows.")] = "",
    format: Annotated[str, typer.Option(help="The format of the rows. auto: told from their content.")] = "auto",
    html: Annotated[Path | None, typer.Option(help="Write a page with example rows here.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="The first N rows of each data set only; 0 = all.")] = 0,
    params: Annotated[Path, typer.Option(help="Whose tokenizer, encoder and limits count.")] = Path("params.yaml"),
    headers_only: Annotated[bool, typer.Option("--headers-only", help="Look at pictures' headers without decoding them.")] = False,
) -> None:
    """What do these data hold, and what is wrong with them? Every row and picture is read; nothing is written or changed.

    Exit code 0: sound. 3: there are bad rows (the first ten are listed). Others: the check could not be made.
    """
    exit_on_error(lambda: _from_here(Asked(data or [], images, format, limit, html, headers_only), params))


def _from_here(asked: "Asked", params: Path) -> None:
    """With every path of the command line as it is meant from the project's root."""
    here = os.getcwd()
    names = [*asked.data, asked.images] if asked.images else asked.data
    params, *found = enter_project(reads=[params, *map(Path, names)], writes=[asked.html] if asked.html else [])
    moved = [str(path) if path.is_absolute() else name for path, name in zip(found, names, strict=False)]
    moved = [os.path.join(here, name) if glob.has_magic(name) and glob.glob(name, root_dir=here) else name for name in moved]
    images = moved.pop() if asked.images else ""
    html = found[-1] if asked.html else None
    _check(replace(asked, data=moved, images=images, html=html), load(params))


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line."""

    data: list[str]
    images: str
    format: str
    limit: int
    html: Path | None
    headers_only: bool


def _check(asked: Asked, params: Params) -> None:
    quiet_libraries()
    warnings.simplefilter("ignore")  # Pillow's, about EXIF and sizes: what matters of them is counted
    if asked.html:
        _require_page(asked.html)
    subjects = open_all(asked, params)  # all of them first: a misspelt name ends it before an hour of reading
    found = [] if asked.data else preflight(params)
    shape, builder, problem = load_builder(params)
    settings = Settings(builder, params.tokenize, not asked.headers_only, EXAMPLES if asked.html else 0)
    model = Model(params.tokenize, shape, context_of(params.llm), problem, params.projector.factor)
    console, reports = open_console(), []
    for finding in found:
        console.print(f"{'note' if finding.note else 'fault'}: {clean(finding.line())}", soft_wrap=True, markup=False)
    for subject in subjects:
        with tqdm(desc=f"check {clean(subject.title)}", unit="row", mininterval=0.5, leave=False, disable=None) as bar:
            reports.append(survey(subject, settings, bar.update))
        show(console, reports[-1], model)
    sound = not any(not finding.note for finding in found) and all(report.good for report in reports)
    total = _costs(reports, params, shape, of_params=not asked.data, timed=sound)
    dealt = params.data.heldout.share  # by content: then no picture is on both sides
    shared = _shared(reports) if not asked.data and not dealt else 0
    if not asked.data and dealt:
        total += f"\ndata.heldout.share is {dealt:g}: all rows are counted here, before the stages deal them out by their pictures"
    verdict = _verdict(reports, shared)
    console.print(total, soft_wrap=True)
    if asked.html:
        write_page(asked.html, reports, model, verdict=verdict, total=total)
        console.print(f"{clean(str(asked.html))}: the same with example rows", soft_wrap=True)
    if not asked.data:
        _require_pictures(reports, params)
    _judge(console, reports, shared, verdict)
    if faults := sum(not finding.note for finding in found):
        raise PipelineError(
            f"the data are sound, and {faults} fault{' stands' if faults == 1 else 's stand'} in the way of a run",
            remedy="see the top of this list",
        )


def _require_page(path: Path) -> None:
    """Before an hour of reading: that the page can go there, and takes no data's place."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise PipelineError("expected a name that ends in .html", where=str(path), remedy="set --html")
    make_folder(path.parent)


def open_all(asked: Asked, params: Params) -> list[Subject]:
    """What was asked for, or the data sets of params; raises `PipelineError` for one that is not there."""
    if not asked.data:
        limit = asked.limit or params.data.limit
        return [_subject(f"data.{name}", _changed(getattr(params.data, name), asked), limit) for name in SETS]
    known = {getattr(params.data, name).records: getattr(params.data, name) for name in reversed(SETS)}
    found = []
    for name in dict.fromkeys(asked.data):
        if name in known:  # with its pictures and columns, as params.yaml gives them
            found.append(_subject(name, _changed(known[name], asked), asked.limit))
        else:
            spec = SourceSpec(name, images=asked.images, format=asked.format, limit=asked.limit)
            found.append(Subject(name, name, asked.images, Source(spec)))
    return found


def _subject(title: str, dataset: Dataset, limit: int) -> Subject:
    within = dataset.images == dataset.records
    return Subject(title, dataset.records, "" if within else dataset.images, open_dataset(dataset, limit=limit))


def _changed(dataset: Dataset, asked: Asked) -> Dataset:
    changes = {"images": asked.images} if asked.images else {}
    return dataset.model_copy(update=changes | ({"format": asked.format} if asked.format != "auto" else {}))


def load_builder(params: Params) -> tuple[Shape | None, PromptBuilder | None, str]:
    """The encoder's shape and the prompt builder; without one of them why."""
    shape = None
    try:
        shape = encoder_shape(params)
        llm = params.llm
        tokens = merged_tokens(shape.tokens, params.projector.factor)
        builder = PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=tokens, date=llm.date)
    except PipelineError as error:
        return shape, None, error.line()
    return shape, builder, ""


def measured_rate(reports: list[Report], params: Params) -> Rate | None:
    """Pictures a second of the encoder, by some of these."""
    return extraction_rate(params, [sample for report in reports for sample in report.pictures.samples])


def extraction_line(title: str, reports: list[Report], shape: Shape | None, rate: Rate | None) -> str:
    """What extraction will cost."""
    contents = np.unique(np.concatenate([report.pictures.contents.sorted() for report in reports]))
    return f"{title}: {cost(len(contents), shape, rate)}" if len(contents) else "extract: no pictures"


def _costs(reports: list[Report], params: Params, shape: Shape | None, *, of_params: bool, timed: bool) -> str:
    """What extraction will cost and, where the data sets are those of params and `timed`, training: a line a stage."""
    read = [report for report in reports if not of_params or report.subject.title.removeprefix("data.") in EXTRACTED]
    title = f"extract ({' and '.join(report.subject.title for report in read) if of_params else 'as pretraining data'})"
    rate = measured_rate(read, params)
    lines = [extraction_line(title, read, shape, rate)]
    if of_params and timed:
        share = params.data.heldout.share
        shares = (1 - share, 1 - share, share or 1.0)  # of rows of their own held-out ones take none away, and few
        parts = [make_part(report, report.subject.source, each) for report, each in zip(reports, shares, strict=True)]
        lines += training_costs(params, dict(zip(SETS, parts, strict=True)), rate)
    return "\n".join(lines)


def _require_pictures(reports: list[Report], params: Params) -> None:
    """Raises `PipelineError` for a data set of text alone that is to train the projector, where no row is bad either."""
    for report, training in zip(reports, (params.pretrain, params.sft), strict=False):
        alone = report.good and not report.bad.count and not report.slots
        if alone and (training is params.pretrain or training.train == "projector"):
            raise no_pictures(f"{report.subject.title}: {report.subject.records}")


def _shared(reports: list[Report]) -> int:
    """How many distinct pictures that are trained on are held out too: tokenize stops at those."""
    *trained, held = (report.pictures.contents for report in reports)
    contents = np.unique(np.concatenate([keys.sorted() for keys in trained]))
    return int(held.has(contents).sum()) if len(contents) else 0


def _verdict(reports: list[Report], shared: int) -> str:
    bad, rows = sum(report.bad.count for report in reports), sum(report.rows for report in reports)
    if shared:
        return f"{shared:,} held-out pictures are trained on; {bad:,} of {rows:,} rows are bad"
    if not rows:
        return "no rows"
    return f"{bad:,} of {rows:,} rows are bad" if bad else f"sound: {rows:,} rows"


def _judge(console: Console, reports: list[Report], shared: int, verdict: str) -> None:
    """Say that all is well, or raise the error that ends the command."""
    if empty := next((report for report in reports if not report.rows), None):
        raise PipelineError("no rows", where=empty.subject.title, remedy="name another file", code=BAD_ROWS)
    if shared:
        remedy = "remove those rows from the training or the held-out records"
        raise PipelineError(verdict, where="data.heldout", remedy=remedy, code=BAD_ROWS)
    if any(report.bad.count for report in reports):
        raise PipelineError(verdict, remedy="mend or remove them, or set data.on_error to skip", code=BAD_ROWS)
    console.print(verdict)
