"""What the check says of the training stages' time: made of what was measured, silent where it cannot be had in a few seconds."""

import math
import tempfile
from pathlib import Path

import pytest
from checked import Project, project  # noqa: F401
from conftest import row
from ruamel.yaml import YAML

from pipeline.check.seconds import Work, encodings
from pipeline.check.timing import HeldoutTime
from pipeline.check.training import Measured, Part, total_seconds
from pipeline.params import Params, check
from pipeline.records import Source, SourceSpec

ROWS, HELD, PICTURES = 1000, 200, 300
SECONDS = HeldoutTime(loss=0.01, answers=0.1, blind=5.0, repeated=False)


def lines(run_stdout: str) -> list[str]:
    return [line for line in run_stdout.splitlines() if line.startswith(("pretrain: ", "sft: "))]


def params_with(project: Project, **changes: object) -> Params:
    project.set(**changes)
    return check(YAML(typ="safe").load(project.folder / "params.yaml"), where="params.yaml")


def parts_of(project: Project) -> dict[str, Part]:
    source = Source(SourceSpec(str(project.write("some", row("<image>x", "y", "0.png"))), images="images"))
    training = Part(source, ROWS, PICTURES, ROWS)
    return {"pretrain": training, "sft": training, "heldout": Part(source, HELD, 40, HELD)}


def measured(name: str, *, epochs: int) -> Measured:
    work = Work(name, "all", rows=ROWS, pictures=PICTURES, fresh=0, visits=ROWS, kept=0, epochs=epochs, step=0.02)
    return Measured(loading=3.0, work=work, heldout=SECONDS, asked=50)


def test_a_stage_takes_its_steps_its_loading_and_its_measuring(project: Project) -> None:
    params, parts = params_with(project, pretrain__epochs=2), parts_of(project)
    expected = 3 + 2 * ROWS * 0.02 + HELD * 0.11 + 5.0 * HELD / 50
    assert total_seconds(params, measured("pretrain", epochs=2), parts, 0.5) == pytest.approx(expected)
    limited = params_with(project, evaluate__limit=20)
    assert total_seconds(limited, measured("pretrain", epochs=2), parts, 0.5) == pytest.approx(3 + 40 + 20 * 0.11 + 2.0)


def test_a_live_encoder_is_counted_and_held_out_losses_on_the_way(project: Project) -> None:
    params, parts, found = params_with(project, sft__batch_size=30), parts_of(project), measured("sft", epochs=1)
    alone = 3 + ROWS * 0.02 + HELD * 0.11 + 20.0
    asked = encodings(found.work, 1) + 40
    assert asked > PICTURES
    assert total_seconds(params, found, parts, 0.5) == pytest.approx(alone + 0.5 * asked)
    often = params_with(project, evaluate__every=10, sft__features="stored")
    assert total_seconds(often, found, parts, 0.5) == pytest.approx(alone + math.ceil(ROWS / 30) // 10 * HELD * 0.01)


def test_questions_that_repeat_are_answered_blind_once(project: Project) -> None:
    params, parts = params_with(project), parts_of(project)
    found = Measured(0.0, measured("pretrain", epochs=1).work, HeldoutTime(0.0, 0.0, 5.0, repeated=True), 50)
    assert total_seconds(params, found, parts, 0.0) == pytest.approx(ROWS * 0.02 + 5.0)


def write_sets(project: Project) -> None:
    for name, numbers in (("pretrain", (0, 1, 2)), ("sft", (0, 1, 2)), ("heldout", (3,))):
        project.write(name, *(row(f"<image>what {n}", "An answer.", f"{number}.png") for number in numbers for n in range(3)))


def test_the_check_times_both_stages_on_the_data_and_leaves_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sets(project)
    project.set(pretrain__batch_size=2, pretrain__epochs=3, sft__batch_size=4, evaluate__limit=2)
    place = project.folder / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr("pipeline.check.training.CHEAP", 10**9)
    monkeypatch.setattr("pipeline.check.training.SECONDS", 0.0)
    before = sorted(project.folder.rglob("*"))
    run = project.run()
    assert run.exit_code == 0, run.output
    pretrain, sft = lines(run.stdout)
    assert pretrain.startswith("pretrain: 15 steps, then 2 held-out rows; about ")
    assert sft.startswith("sft: 3 steps, then 2 held-out rows; about ")
    assert pretrain.endswith(" on this machine")
    assert sorted(project.folder.rglob("*")) == before
    assert "timing" not in run.stderr


def test_models_that_are_large_or_elsewhere_are_not_loaded_for_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sets(project)
    monkeypatch.setattr("pipeline.check.training.load_encoder", None)
    run = project.run()
    assert run.exit_code == 0, run.output
    assert all(line.endswith("; time unknown, `glance advise` measures it") for line in lines(run.stdout))
    assert len(lines(run.stdout)) == 2
    Path("sft.jsonl").write_text("{}\n")
    assert not lines(project.run().stdout), "no row that a run could train on"
