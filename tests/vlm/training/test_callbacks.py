"""Looking at a run: a trace of some steps, figures to a tracker, and nothing where nothing was asked for."""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator

from pipeline.core import PipelineError
from pipeline.params import schema
from pipeline.vlm.training.callbacks import WARM_UP, step_callback
from pipeline.vlm.training.tracking import SILENT, Log, require_tracker, tracked

TRACKERS = [name for name in get_args(schema.Tracker) if name != "none"]


def steps(folder: Path, count: int, *, profile: int = 0, log: Log | None = None) -> None:
    with step_callback(folder, profile=profile, log=log) as step:
        for number in range(count):
            torch.ones(4) @ torch.ones(4)
            step({"step": number, "loss": 1.0 / (number + 1), "lr": 0.1, "grad_norm": 2.0})


def test_the_steps_that_were_asked_for_are_traced(tmp_path: Path) -> None:
    steps(tmp_path, WARM_UP + 4, profile=2)
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::dot" in names


def test_a_run_shorter_than_the_trace_ends_without_an_error(tmp_path: Path) -> None:
    steps(tmp_path, 1, profile=50)


def track(tracker: str, folder: Path) -> None:
    accelerator, config = Accelerator(mixed_precision="no", cpu=True), {"lr": 0.1, "epochs": 2}
    with tracked(accelerator, tracker, "sft", folder, config) as log:
        steps(folder, 3, log=log)
        assert (log is None) == (tracker == "none")
        if log is not None:
            log({"heldout_loss": 0.25}, 2)
    assert not accelerator.trackers


def test_figures_go_to_dvclive(tmp_path: Path) -> None:
    track("dvclive", tmp_path)
    lines = (tmp_path / "sft/plots/metrics/loss.tsv").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("0.5")
    assert (tmp_path / "sft/plots/metrics/heldout_loss.tsv").is_file()
    assert not (tmp_path / "dvc.yaml").exists()


def test_figures_go_to_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "sft"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert [event.step for event in events.Scalars("heldout_loss")] == [2]


def test_none_imports_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it has an error
    require_tracker("none")
    track("none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PipelineError, match=f"runtime.track: {name} is not installed -> pip install {name}, or set it to none"):
        require_tracker(name)


@pytest.mark.parametrize("name", TRACKERS)
def test_nothing_is_sent_where_nobody_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tracker would be told, and that the user's own word goes before it."""
    told: dict[str, Any] = {}

    def begin(accelerator: Accelerator, project: str, _: object, options: dict[str, Any]) -> None:
        told.update(options[name], project=project, logs=accelerator.logging_dir, environment=dict(os.environ))

    monkeypatch.setattr(Accelerator, "init_trackers", begin)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].__spec__ = ModuleSpec(name, None)
    for words in SILENT.values():
        for word in words:
            monkeypatch.delenv(word, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track_only(name, tmp_path)
    environment = told["environment"]
    assert all(environment[word] == value for word, value in SILENT.get(name, {}).items())
    if name == "wandb":
        assert environment["WANDB_MODE"] == "offline"
        assert told["dir"] == str(tmp_path)
        monkeypatch.setenv("WANDB_MODE", "online")
        track_only(name, tmp_path)
        assert told["environment"]["WANDB_MODE"] == "online", "asked for"
    if name == "mlflow":
        assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    if name == "tensorboard":
        assert (told["logs"], told["project"]) == (str(tmp_path), "sft")


def track_only(name: str, folder: Path) -> None:
    with tracked(Accelerator(mixed_precision="no", cpu=True), name, "sft", folder, {}):
        pass


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object) -> None:
        raise RuntimeError("no key")

    monkeypatch.setattr(Accelerator, "init_trackers", begin)
    with pytest.raises(PipelineError, match=r"runtime\.track: dvclive cannot begin: .*no key.* -> set it to none"):
        track_only("dvclive", tmp_path)


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    steps(tmp_path / "none", 3)
    assert not (tmp_path / "none").exists()
