"""Looking at a run: a trace of some steps, a stream of figures, and no trace where none was asked for."""

import json
from pathlib import Path

import torch

from pipeline.vlm.training.callbacks import WARM_UP, step_callback


def steps(folder: Path, count: int, **options: bool | int) -> None:
    with step_callback(folder, **{"profile": 0, "live": False, **options}) as step:  # type: ignore[arg-type]
        for number in range(count):
            torch.ones(4) @ torch.ones(4)
            step({"step": number, "loss": 1.0 / (number + 1), "lr": 0.1, "grad_norm": 2.0})


def test_the_steps_that_were_asked_for_are_traced(tmp_path: Path) -> None:
    steps(tmp_path, WARM_UP + 4, profile=2)
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::dot" in names


def test_a_run_shorter_than_the_trace_ends_without_an_error(tmp_path: Path) -> None:
    steps(tmp_path, 1, profile=50)


def test_figures_are_streamed_through_dvclive(tmp_path: Path) -> None:
    steps(tmp_path, 3, live=True)
    lines = (tmp_path / "plots" / "metrics" / "loss.tsv").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("0.5")


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    steps(tmp_path / "none", 3)
    assert not (tmp_path / "none").exists()
