"""`glance new PICTURES`: a folder of pictures with captions or conversations -> params.yaml, and the three commands to run next."""

import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tqdm import tqdm

from pipeline.check import (
    Model,
    Report,
    Settings,
    Subject,
    context_of,
    extraction_line,
    load_builder,
    make_part,
    measured_rate,
    open_console,
    show,
    survey,
    training_costs,
)
from pipeline.core import PipelineError, enter_project, exit_on_error, quiet_libraries, run_command
from pipeline.params import Params, check, load
from pipeline.project.columns import as_option, read_columns
from pipeline.project.files import Files, propose, tell_untracked
from pipeline.project.plan import Plan, find_records, make_plan
from pipeline.project.use import take
from pipeline.records import Columns, Source, SourceSpec, open_dataset

SHOWN = (".jpg", ".jpeg", ".png", ".webp")

app = typer.Typer(add_completion=False)


@app.command()
def new(
    pictures: Annotated[Path, typer.Argument(help="Folder or zip of your pictures, or a file that holds rows and pictures.")],
    records: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder of captions or conversations; twice for both. Without: found beside the pictures."),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(help="As `glance use` takes it: smollm2-135m, a hub id or a folder. Without: what params.yaml names."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Where rows keep a part under a name of their own: text=description, images=photo (docs/your-data.md)."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written.")] = False,
) -> None:
    """Set the project up for your own pictures: finds what the data are, writes params.yaml, says why and what comes next.

    The models stay those of params.yaml unless --language-model names others. Nothing is copied: DVC watches your files in place.
    """
    exit_on_error(lambda: _new(pictures, records or [], language_model, columns=column or [], yes=yes, dry_run=dry_run))


def _new(
    pictures: Path, given: list[Path], language_model: str | None, *, columns: Sequence[str] = (), yes: bool, dry_run: bool
) -> None:
    pictures, *given = enter_project(reads=[pictures, *given])
    quiet_libraries()
    warnings.simplefilter("ignore")  # Pillow's, about EXIF and sizes
    console, files, found = open_console(), Files(), find_records(pictures, given)
    if language_model is not None:
        console.print(take(files, language_model), soft_wrap=True)
    params, named = check(files.plain_params(), where="params.yaml"), read_columns(columns)
    reports, model = _survey(found, pictures, params, named)
    for report in reports:
        show(console, report, model)
    plan = make_plan(reports, pictures, {name: files.params[name] for name in ("pretrain", "sft")}, named)
    for section, values in plan.sections.items():
        files.change(section, values)
    for name in ("pretrain", "sft", "heldout"):
        files.forget(f"data.{name}", set(plan.sections[f"data.{name}"]))
    console.print()
    for reason in plan.reasons:
        console.print(f"- {reason}", soft_wrap=True, highlight=False)
    console.print()
    if propose(files, console, yes=yes, dry_run=dry_run):
        _tell_costs(console, reports, plan, model)
        _tell_next(console, pictures)


def _survey(found: list[Path], pictures: Path, params: Params, named: dict[str, Any]) -> tuple[list[Report], Model]:
    shape, builder, problem = load_builder(params)
    settings = Settings(builder, params.tokenize, True, 0)
    reports = []
    for path in found:
        images = "" if path == pictures else str(pictures)
        try:
            subject = Subject(str(path), str(path), images, Source(SourceSpec(str(path), images=images, columns=Columns(**named))))
            with tqdm(desc=f"reading {path.name}", unit="row", mininterval=0.5, leave=False, disable=None) as bar:
                reports.append(survey(subject, settings, bar.update))
        except PipelineError as error:
            raise as_option(error) from None
    return reports, Model(params.tokenize, shape, context_of(params.llm), problem, params.projector.factor)


def _tell_costs(console: Console, reports: list[Report], plan: Plan, model: Model) -> None:
    """What disk and time the stages will take, by params.yaml as it is written."""
    params = load(Path("params.yaml"))
    rate, share = measured_rate(reports, params), params.data.heldout.share
    parts = {
        name: make_part(report, open_dataset(getattr(params.data, name)), share if name == "heldout" else 1 - share)
        for name, report in plan.reports.items()
    }
    for line in (extraction_line("extract", reports, model.shape, rate), *training_costs(params, parts, rate)):
        console.print(line, soft_wrap=True, highlight=False)
    console.print()


def _tell_next(console: Console, pictures: Path) -> None:
    """The commands."""
    shown = next((path for path in sorted(pictures.rglob("*")) if path.suffix.lower() in SHOWN), None)
    first = shlex.quote(str(shown)) if shown else "PICTURE"
    commands = [
        ("dvc repro", "extract, tokenize, pretrain, sft"),
        (f'glance chat {first} "Describe the picture."', "an answer of your model"),
    ]
    sweep = [
        ("dvc exp run --queue -S 'pretrain.lr=1e-3,2e-3,4e-3'", "three experiments ..."),
        ("dvc queue start", "... one by one"),
    ]
    width = max(len(command) for command, _ in [*commands, *sweep])
    for command, what in [*commands, *sweep]:
        console.print(f"  {command:<{width}}  {what}", highlight=False, soft_wrap=True)
    tell_untracked(console)


if __name__ == "__main__":
    run_command(app)
