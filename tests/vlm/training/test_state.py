"""An interrupted training run goes on where it stopped and ends with the bits of one that was never interrupted."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import ROWS, World
from test_loop import SCHEDULE, bits

from pipeline.core.errors import INTERRUPTED, PipelineError
from pipeline.core.locks import hold
from pipeline.features.sources import StoredFeatures
from pipeline.params.reading import override, read_yaml
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.evaluation.heldout import Heldout
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.checkpointing import Checkpointer
from pipeline.vlm.training.loop import train
from pipeline.vlm.training.state import TrainingState

ROOT = Path(__file__).parents[3]
STEPS = 2 * -(-len(ROWS) // SCHEDULE.batch_size)


class Stopping(Checkpointer):
    """Asks the run to stop after a number of steps of this attempt, as a signal would."""

    def __init__(self, resume: TrainingState, steps: int, heldout: Heldout | None = None) -> None:
        super().__init__(resume, minutes=0, heldout=heldout)
        self.left = steps

    def after_step(self, *arguments: object, **options: object) -> None:
        self.left -= 1
        self._stop = self.left == 0
        super().after_step(*arguments, **options)  # type: ignore[arg-type]


def attempt(world: World, what: str, checkpointer: Checkpointer | None) -> tuple[VisionLanguageModel, list[dict[str, float]]]:
    model = world.model(what)
    examples = Examples(world.table, StoredFeatures(world.store, world.table), world.builder.image_id)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    history = train(model, examples, SCHEDULE, accelerator, callbacks=Callbacks(checkpointer=checkpointer))
    return model, history


@pytest.mark.parametrize("what", ["projector", "projector+ends", "all"])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 2, 4])
def test_a_run_stopped_again_and_again_ends_with_the_bits_of_an_undisturbed_one(
    world: World, tmp_path: Path, what: str, stride: int
) -> None:
    whole, history = attempt(world, what, None)
    assert len(history) == STEPS
    codes = []
    while True:
        try:
            resumed, pieces = attempt(world, what, Stopping(TrainingState(tmp_path, "t", {"k": 1}), stride))
            break
        except PipelineError as error:
            codes.append(error.code)
    assert codes == [INTERRUPTED] * ((STEPS - 1) // stride)
    assert bits(resumed) == bits(whole)
    assert pieces == history


def test_a_finished_run_is_not_trained_again(world: World, tmp_path: Path) -> None:
    resume = TrainingState(tmp_path, "t", {"k": 1})
    first, history = attempt(world, "projector", Checkpointer(resume, minutes=60))
    second, again = attempt(world, "projector", Stopping(resume, 1))  # would stop at the first step it made
    assert again == history
    assert bits(second) == bits(first)
    resume.clear()
    assert not resume.folder.exists()


def test_signals_mean_again_what_they_meant_when_training_is_over(world: World, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    checkpointer = Checkpointer(TrainingState(tmp_path, "t", {"k": 1}), minutes=60)
    assert signal.getsignal(signal.SIGTERM) != before[0]
    attempt(world, "projector", checkpointer)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_damaged_newest_state_is_passed_over_aloud(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = TrainingState(tmp_path, "t", {"k": 1})
    with pytest.raises(PipelineError):
        attempt(world, "projector", Stopping(resume, 2))
    (newest,) = resume.folder.iterdir()
    shutil.copytree(newest, resume.folder / "00000009")
    (resume.folder / "00000009/state.safetensors").write_bytes(b"half")
    resumed, history = attempt(world, "projector", Checkpointer(resume, minutes=60))
    assert "00000009 is not whole" in capsys.readouterr().out
    whole, undisturbed = attempt(world, "projector", None)
    assert (bits(resumed), history) == (bits(whole), undisturbed)


@pytest.mark.parametrize("date", ["future", *(pytest.param(date, marks=pytest.mark.slow) for date in ("equal", "backwards"))])
def test_only_the_runs_that_saved_last_are_kept_whatever_their_dates(world: World, tmp_path: Path, date: str) -> None:
    for number, key in enumerate("abcdef"):
        with pytest.raises(PipelineError):
            attempt(world, "projector", Stopping(TrainingState(tmp_path, "t", {"k": key}), 1))
        mine = TrainingState(tmp_path, "t", {"k": key}).folder
        assert mine.is_dir(), "a run never removes its own"
        seconds = {"future": 4e9 - number, "equal": 1e9, "backwards": 1e9 - number}[date]
        for path in (mine, *mine.rglob("*")):
            os.utime(path, (seconds, seconds))
    assert {path.name for path in tmp_path.iterdir()} == {TrainingState(tmp_path, "t", {"k": key}).folder.name for key in "def"}


def test_a_run_never_removes_its_own_state_nor_that_of_a_living_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    states = tmp_path / "states"
    first = TrainingState(states, "t", {"k": "a"})
    with pytest.raises(PipelineError):
        attempt(world, "projector", Stopping(first, 1))
    for name in ("b", "c", "d"):  # copies by hand, from a machine whose clock runs ahead
        copy = shutil.copytree(first.folder, states / f"t-copy-{name}")
        for path in (copy, *copy.rglob("*")):
            os.utime(path, (4e9, 4e9))
    with hold("t-copy-b", tmp_path / ".dvc/tmp/locks"), pytest.raises(PipelineError, match="state saved"):
        attempt(world, "projector", Stopping(first, 1))
    assert [int(path.name) for path in first.folder.iterdir()] == [2]
    assert {path.name for path in states.glob("t-copy-*")} == {"t-copy-b", "t-copy-c", "t-copy-d"}
    with pytest.raises(PipelineError, match="state saved"):
        attempt(world, "projector", Stopping(first, 1))
    assert {path.name for path in states.glob("t-copy-*")} == {"t-copy-c", "t-copy-d"}


def test_a_state_under_another_steps_name_is_passed_over(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = TrainingState(tmp_path, "t", {"k": 1})
    with pytest.raises(PipelineError):
        attempt(world, "projector", Stopping(resume, 2))
    shutil.copytree(resume.folder / "00000002", resume.folder / "00000005")
    resumed, history = attempt(world, "projector", Checkpointer(resume, minutes=60))
    assert "00000005 is not whole and is passed over (holds the state after 2 steps)" in capsys.readouterr().out
    whole, undisturbed = attempt(world, "projector", None)
    assert (bits(resumed), history) == (bits(whole), undisturbed)


def test_a_state_of_other_params_is_not_taken_up_and_the_difference_is_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PipelineError):
        attempt(
            world, "projector", Stopping(TrainingState(tmp_path, "t", {"schedule": {"lr": 0.5, "seed": 1}, "tokens": "a" * 32}), 1)
        )
    other = TrainingState(tmp_path, "t", {"schedule": {"lr": 0.25, "seed": 1}, "tokens": "b" * 32})
    _, history = attempt(world, "projector", Checkpointer(other, minutes=60))
    assert history[0]["step"] == 0
    said = capsys.readouterr().out
    assert "schedule.lr 0.5 -> 0.25, tokens aaaaaaaaaaaa… -> bbbbbbbbbbbb…" in said
    assert "seed" not in said


def test_the_schedule_of_learning_rates_is_unbroken(world: World, tmp_path: Path) -> None:
    resume = TrainingState(tmp_path, "t", {"k": 1})
    with pytest.raises(PipelineError):
        attempt(world, "projector", Stopping(resume, 3))
    _, pieces = attempt(world, "projector", Checkpointer(resume, minutes=60))
    _, whole = attempt(world, "projector", None)
    assert [row["lr"] for row in pieces] == [row["lr"] for row in whole]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a few hundred rows, extracted and tokenised, its models linked."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("dvc.yaml", "pipeline", "stages"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / ".dvc").mkdir()
    for name in ("easyvqa", "models"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    shutil.copy(ROOT / "params.yaml", folder)
    set_params(folder, "data.limit=160", "evaluate.limit=8", "pretrain.batch_size=4", "runtime.save_minutes=0")
    for name in ("extract", "tokenize"):
        assert start(name, folder).wait(timeout=300) == 0
    return folder


def start(name: str, folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"stages.{name}"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def set_params(folder: Path, *changes: str) -> None:
    from ruamel.yaml import YAML

    content = read_yaml(folder / "params.yaml")
    override(content, list(changes))
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(content, file)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_stage_ends_with_the_files_of_an_undisturbed_one(workspace: Path, number: signal.Signals, keep: str) -> None:
    set_params(workspace, f"pretrain.keep={keep}", f"evaluate.every={7 if keep == 'best' else 0}")
    assert start("pretrain", workspace).wait(timeout=300) == 0
    figures = json.loads((workspace / "metrics/pretrain.json").read_text())
    expected = outputs(workspace)
    assert ("samples.json" in expected) == ("best_step" in figures) == (keep == "best")
    assert expected["heldout.csv"].startswith(b"step,loss")
    if keep == "best":
        curve = [(float(row["loss"]), int(row["step"])) for row in csv.DictReader(expected["heldout.csv"].decode().splitlines())]
        assert (figures["loss"], figures["best_step"]) == (pytest.approx(min(curve)[0], abs=1e-5), min(curve)[1])
        assert [step for _, step in curve] == [*range(6, figures["steps"] - 1, 7), figures["steps"] - 1]
    states = workspace / ".dvc/tmp/resume"
    kills, seen = 0, -1
    while True:
        running = start("pretrain", workspace)
        while running.poll() is None:
            steps = [int(path.name) for path in states.glob("pretrain-*/[0-9]*")]
            if kills < 3 and steps and max(steps) > seen + 15:  # it has got on since the last kill
                seen = max(steps)
                kills += 1
                running.send_signal(number)
                assert running.wait(timeout=60) != 0
                break
            time.sleep(0.01)
        else:
            assert running.returncode == 0
            break
    assert kills == 3
    assert outputs(workspace) == expected
    assert list(states.iterdir()) == []


def outputs(folder: Path) -> dict[str, bytes]:
    found = [*(folder / "models/pretrain").iterdir(), *(folder / "results/pretrain").iterdir()]
    contents = {path.name: path.read_bytes() for path in found}
    shutil.rmtree(folder / "models")
    shutil.rmtree(folder / "results")
    return contents
