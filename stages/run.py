"""What every stage does first and last: parameters narrowed to its own, one-line errors, figures, no orphans."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core import PipelineError, exit_on_error, hold, keep_figures, quiet_libraries, take_debug
from pipeline.params import StageParams, load_for_stage, read_yaml
from stages.launch import SAID, launch, require_devices
from stages.preflight import run_preflight
from stages.stale import drop_stale_figures

LOCKS = Path(".dvc/tmp/locks")
PARALLEL = ("extract", "pretrain", "sft")
_TRAINING = "lower {0}.micro_tokens (tokens of one pass), then {0}.batch_size; runtime.eval_batch while it answers questions"
MEMORY = {  # what mends a lack of it
    "extract": "lower runtime.extract_batch or runtime.workers",
    "tokenize": "lower runtime.tokenize_workers",
    "pretrain": _TRAINING.format("pretrain"),
    "sft": _TRAINING.format("sft"),
}


def run_stage(name: str, work: Callable[[StageParams], dict[str, Any]]) -> None:
    """Run one stage in the project's root folder and write `metrics/<name>.json` from what it returns.

    `seconds` and `peak_memory_gb` are added; what a run took is kept apart (`keep_figures`). Whatever fails ends as one line and
    a non-zero exit code; `--debug` shows where.
    One run of a stage at a time: a second one in the same workspace names the first and ends.
    """

    def whole() -> None:
        quiet_libraries()
        params = load_for_stage(name)
        _require_listed_models(name, params)
        if os.environ.get("RANK", "0") == "0" and SAID not in os.environ:  # else the launcher has looked
            run_preflight()
        if params.runtime.processes > 1 and "RANK" not in os.environ and name in PARALLEL:
            require_devices(params.runtime.processes, params.runtime.device)
            launch(f"stages.{name}", params.runtime.processes)
        if int(os.environ.get("RANK", "0")):
            _work_and_report(name, work, params)
            return
        with hold(name, LOCKS):  # of several processes the first one speaks for all
            _work_and_report(name, work, params)

    take_debug()
    exit_on_error(whole, memory=MEMORY[name])


def _work_and_report(name: str, work: Callable[[StageParams], dict[str, Any]], params: StageParams) -> None:
    from pipeline.core.devices import peak_memory_gb, pick_device

    began, failure = time.perf_counter(), None
    try:
        figures = work(params)
    except PipelineError as error:
        if error.figures is None:
            raise
        failure, figures = error, error.figures
    if "RANK" in os.environ and not _writes(name):
        if failure:
            raise failure
        return
    figures["seconds"] = round(time.perf_counter() - began, 1)
    figures["peak_memory_gb"] = round(peak_memory_gb(pick_device(params.runtime.device)), 3)
    keep_figures(Path("metrics") / f"{name}.json", figures)
    drop_stale_figures(name)
    shown = ", ".join(f"{key} {value}" for key, value in figures.items() if not isinstance(value, dict))
    print(f"{name}: {shown}", flush=True)
    if failure:
        raise failure


def _writes(stage: str) -> bool:
    """Whether this process of several writes for its work tree."""
    from pipeline.core.trees import is_first_of_tree

    return is_first_of_tree() if stage in PARALLEL else os.environ["RANK"] == "0"


def _require_listed_models(stage: str, params: StageParams) -> None:
    """A model in a folder must be a dependency, or a change of its files would not re-run the stage."""
    listed = [Path(str(dep)) for dep in read_yaml(Path("dvc.yaml"))["stages"][stage].get("deps", [])]
    for section in ("vision", "llm"):
        try:
            named = getattr(params, section).model
        except PipelineError:
            continue
        for model in named if isinstance(named, list) else [named]:
            folder = Path(model)
            if folder.is_dir() and not any(folder == dep or dep in folder.parents for dep in listed):
                raise PipelineError(
                    f"{section}.model is the folder {model}, which is not a dependency of stage {stage}",
                    where="dvc.yaml",
                    remedy=f"add {model} to stages.{stage}.deps",
                )
