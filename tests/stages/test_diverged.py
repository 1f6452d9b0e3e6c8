"""A training stage at a learning rate of 1 fails in one line, leaves no model, and says so in its metrics."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import World
from projects import Project

from pipeline.core.errors import NUMERIC, PipelineError
from pipeline.report import read_metrics
from stages import pretrain
from stages.run import _work_and_report

Png = Callable[[int], bytes]


@pytest.fixture
def project(world: World, png: Png, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    made = Project(world, tmp_path)
    answers = ["Blue.", "Red.", "It is a red circle.", "A square."]
    for name, first in (("pretrain", 0), ("sft", 0), ("heldout", 12)):
        rows = []
        for number in range(first, first + 12):
            (made.pictures / f"{number}.png").write_bytes(png(number))
            said = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": answers[number % 4]}]
            rows.append({"messages": said, "images": [f"{number}.png"]})
        made.write(f"{name}.jsonl", rows)
    made.set("pretrain.train=all", "pretrain.epochs=3")
    made.run("extract", "tokenize")
    return made


def test_a_run_at_a_learning_rate_of_1_is_no_model(project: Project) -> None:
    params = project.stage_params("pretrain", "pretrain.lr=1.0", "pretrain.min_lr=1.0", "pretrain.epochs=8")
    with pytest.raises(PipelineError) as caught:
        _work_and_report("pretrain", pretrain.main, params)
    assert caught.value.code == NUMERIC
    line = caught.value.line()
    assert line.startswith("pretrain.lr 1: the run has diverged: ")
    assert "no model is written -> lower pretrain.lr; " in line
    assert not (project.folder / "models").exists()
    figures = json.loads((project.folder / "metrics/pretrain.json").read_text())
    assert figures["diverged"] is True
    assert {"loss", "accuracy", "steps"} <= figures.keys()
    assert len((project.folder / "results/pretrain/history.csv").read_text().splitlines()) == figures["steps"] + 1
    for name in ("extract", "tokenize"):
        (project.folder / f"metrics/{name}.json").write_text('{"cache_mb": 0.1, "images": 24}')
    with pytest.raises(PipelineError, match=r"metrics/pretrain\.json: the last run has diverged, and left no model -> lower"):
        read_metrics(project.folder / "metrics")


def test_a_sound_run_says_nothing_of_it(project: Project) -> None:
    _work_and_report("pretrain", pretrain.main, project.stage_params("pretrain"))
    assert "diverged" not in json.loads((project.folder / "metrics/pretrain.json").read_text())
    assert (project.folder / "models/pretrain/glance.json").is_file()
