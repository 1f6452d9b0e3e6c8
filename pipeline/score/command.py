"""The command `python -m pipeline.score`, which is also what the stages of score/dvc.yaml run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field
from rich.console import Console
from rich.table import Table

from pipeline.core import PipelineError, enter_project, exit_on_error, quiet_libraries, write_json
from pipeline.params import Section, load, read_yaml, validated
from pipeline.score.tasks import TASKS

PARAMS = Path("score/params.yaml")
MEMORY = "lower runtime.eval_batch, or runtime.extract_batch while pictures are encoded"


class ScoreParams(Section):
    """score/params.yaml: the model, the share of the questions, and the folder of each task's copy."""

    model: Annotated[str, Field(min_length=1)]
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    tasks: dict[str, Annotated[str, Field(min_length=1)]]


def score(
    model: Annotated[Path | None, typer.Argument(help="Folder of a trained model, such as models/sft.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="TASK…", help=f"TASK=FOLDER, or TASK for DATA/TASK. {', '.join(TASKS)}.")
    ] = None,
    data: Annotated[Path, typer.Option(help="The folder with a folder for each task.")] = Path("data/benchmarks"),
    out: Annotated[Path, typer.Option(help="Folder to write: a folder a task, with every answer and the figures.")] = Path(
        "results/score"
    ),
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the questions, to try things: 0.05 = a twentieth.")] = 1.0,
    stage: Annotated[str | None, typer.Option(hidden=True, help="A task of score/params.yaml, as score/dvc.yaml runs it.")] = None,
) -> None:
    """How does a model do on public benchmarks? Each score has its interval and the blind control beside it."""
    if stage is not None:
        exit_on_error(lambda: _stage(stage), memory=MEMORY)
    exit_on_error(lambda: _score(model, tasks or [], data=data, out=out, share=share), memory=MEMORY)


def _score(model: Path | None, tasks: list[str], *, data: Path, out: Path, share: float) -> None:
    if model is None or not tasks:
        raise PipelineError("which model, on which tasks?", where="command line", remedy=f"{_USAGE}; tasks: {', '.join(TASKS)}")
    if not share:
        raise PipelineError("a share of 0 asks nothing", where="command line", remedy="set --share to more than 0, up to 1")
    named = [(name, Path(folder) if folder else data / name) for name, _, folder in (task.partition("=") for task in tasks)]
    for number, (name, _) in enumerate(named):
        _require_task(name)
        if name in dict(named[:number]):
            raise PipelineError(f"task {name} stands twice", where="command line", remedy="name it once")
    model, *folders, out = enter_project(reads=[model, *(folder for _, folder in named)], writes=[out])
    _run(model, dict(zip(dict(named), folders, strict=True)), out, share)


_USAGE = "glance score MODEL TASK…, such as: glance score models/sft pope"


def _stage(task: str) -> None:
    """One task as score/params.yaml names it; its figures go to metrics/score/TASK.json too."""
    params = validated(ScoreParams, read_yaml(PARAMS), where=str(PARAMS))
    for name in (task, *params.tasks):
        _require_task(name)
    if task not in params.tasks:
        raise PipelineError(f"task {task} has no folder", where=str(PARAMS), remedy=f"add it to tasks: {task}: FOLDER")
    found = _run(Path(params.model), {task: Path(params.tasks[task])}, Path("results/score"), params.share)
    write_json(Path("metrics/score") / f"{task}.json", {task: _columns(found[task])})


def _require_task(name: str) -> None:
    if name not in TASKS:
        raise PipelineError(f"no task {name!r}", where="command line", remedy=f"one of {', '.join(TASKS)}")


def _run(model: Path, folders: dict[str, Path], out: Path, share: float) -> dict[str, dict[str, Any]]:
    from pipeline.score.benchmark import Benchmark

    quiet_libraries()
    params = load()
    for name in folders:
        _require_room(out / name)
    benchmarks = [Benchmark(name, folder, share=share) for name, folder in folders.items()]  # all are looked at before any is asked
    from pipeline.score.scoring import Model, score_task

    opened, found = Model.open(model, params), {}
    for benchmark in benchmarks:
        found[benchmark.name] = score_task(opened, benchmark, out / benchmark.name)
        _tell(found[benchmark.name])
    Console(width=100).print(_table(found))
    print(f"every answer: {out}/TASK/predictions.parquet", flush=True)
    return found


def _require_room(folder: Path) -> None:
    """Raises `PipelineError` unless a task's folder is new or of an earlier score: it is replaced, and could be the copy itself."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "scores.json").is_file():
        raise PipelineError("is not empty and not an earlier score", where=str(folder), remedy="set --out to another folder")
    if folder.exists() and not folder.is_dir():
        raise PipelineError("is a file", where=str(folder), remedy="set --out to another folder")


def _columns(found: dict[str, Any]) -> dict[str, Any]:
    """What `dvc exp show` has of a task: each figure, its interval and blind."""
    flat = {"questions": found["questions"]}
    for name, figure in found["figures"].items():
        flat |= {name: figure["value"], **{f"{name}_{key}": figure[key] for key in ("low", "high", "blind")}}
    return flat


def _tell(found: dict[str, Any]) -> None:
    for warning in found["warnings"]:
        print(f"{found['task']}: warning: {warning}", flush=True)


def _table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table("task", "questions", "figure", "value", "95 % interval", "blind")
    for column in table.columns[3:]:
        column.justify = "right"
    for name, scores in found.items():
        for number, (figure, values) in enumerate(scores["figures"].items()):
            first = (name, f"{scores['questions']:,}") if not number else ("", "")
            shown = [f"{values[key]:.2f}" if figure in ("perception", "cognition") else f"{values[key]:.2%}" for key in values]
            table.add_row(*first, figure, shown[0], f"{shown[1]} to {shown[2]}", shown[3])
    return table
