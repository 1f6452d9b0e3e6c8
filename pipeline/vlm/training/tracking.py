"""A training run's figures to the tracker that `runtime.track` names, by accelerate's own trackers; offline.

tensorboard, dvclive, mlflow   write below .dvc/tmp/watch, outside DVC's outputs
trackio                        writes where it always does, on this machine
wandb                          writes below .dvc/tmp/watch; `wandb sync` sends it

A tracker sends something only where its own environment variables say where to (WANDB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_SPACE_ID, DVC_STUDIO_TOKEN). No output of a stage depends on it.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.core import PipelineError, brief, make_folder

Log = Callable[[dict[str, float], int], None]
NAME = "glance"
SILENT = {  # what says that nothing is to be sent, where nobody has said anything
    "wandb": {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"},
    "dvclive": {"DVC_NO_ANALYTICS": "1"},
}


def require_tracker(track: str) -> None:
    """Raises `PipelineError` where the package is not installed; nothing is imported."""
    if track != "none" and importlib.util.find_spec(track) is None:
        raise PipelineError(f"{track} is not installed", where="runtime.track", remedy=f"pip install {track}, or set it to none")


@contextmanager
def tracked(accelerator: Accelerator, track: str, stage: str, folder: Path, config: dict[str, Any]) -> Iterator[Log | None]:
    """Yields what takes figures and their step; None for `none`.

    Args:
        folder: where trackers write that take a folder.
        config: the run's numbers, by their dotted names.

    Raises `PipelineError` for a tracker that cannot begin. The first process of all speaks for all.
    """
    if track == "none":
        yield None
        return
    require_tracker(track)
    if accelerator.is_main_process:
        make_folder(folder)
    for name, value in SILENT.get(track, {}).items():
        os.environ.setdefault(name, value)
    if track == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    name, options = _options(track, stage, folder)
    accelerator.log_with, accelerator.project_configuration.logging_dir = [track], str(folder)
    try:
        accelerator.init_trackers(name, config, {track: options})
    except Exception as error:  # each has its own
        raise PipelineError(f"{track} cannot begin: {brief(error)}", where="runtime.track", remedy="set it to none") from None
    try:
        yield lambda figures, step: accelerator.log(figures, step=step)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()  # or the end of the training would finish them again


def _options(track: str, stage: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What the run or its project is called, and what the tracker is told beside."""
    if track == "tensorboard":
        return stage, {}
    if track == "dvclive":
        return stage, {"dir": str(folder / stage), "dvcyaml": None, "save_dvc_exp": False, "report": None}
    if track == "wandb":
        return NAME, {"dir": str(folder), "name": stage}
    if track == "mlflow":
        return NAME, {"run_name": stage, "logging_dir": (folder / "mlflow").resolve().as_uri()}
    return NAME, {"name": stage}
