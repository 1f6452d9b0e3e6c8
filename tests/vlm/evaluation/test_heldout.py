"""Held-out loss on the way: it changes nothing, it is measured on the model as it is, and the best state survives any kill."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import World, row
from test_loop import SCHEDULE, bits
from test_state import STEPS, Stopping

from pipeline.core.errors import NUMERIC, PipelineError
from pipeline.features.sources import StoredFeatures
from pipeline.params.reading import check, override, read_yaml
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.evaluation.answering import Answering, answer_questions
from pipeline.vlm.evaluation.heldout import Heldout, write_losses
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.evaluation.questions import find_questions
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.checkpointing import Checkpointer
from pipeline.vlm.training.loop import train
from pipeline.vlm.training.state import TrainingState

CURVE = [5.0, 3.0, 4.0, 3.0, 6.0, 7.0]  # the lowest comes twice, and not at the end


@pytest.fixture(scope="module")
def unseen(world: World) -> TokenTable:
    return world.tokens([row("<image>\nWhat is this?", "A square.", "4.png"), row("Is there a circle?", "No.")], "unseen")


def accelerator() -> Accelerator:
    return Accelerator(mixed_precision="no", cpu=True)


def measure_on(world: World, unseen: TokenTable) -> Heldout:
    source = StoredFeatures(world.store, unseen)

    def measure(model: VisionLanguageModel) -> float:
        return heldout_loss(model, Examples(unseen, source, world.builder.image_id), accelerator(), micro_tokens=500)

    asking, questions = Answering(6, 4, 999, alike=True), find_questions(unseen)
    examples = Examples(unseen, source, world.builder.image_id)

    def answer(model: VisionLanguageModel) -> list[str]:
        return answer_questions(model, examples, accelerator(), world.builder, asking, questions)

    return Heldout(measure, every=2, answer=answer)


def attempt(
    world: World, what: str, heldout: Heldout | None, checkpointer: Checkpointer | None
) -> tuple[VisionLanguageModel, list[dict[str, float]]]:
    model, source = world.model(what), StoredFeatures(world.store, world.table)
    examples, callbacks = Examples(world.table, source, world.builder.image_id), Callbacks(checkpointer, heldout)
    return model, train(model, examples, SCHEDULE, accelerator(), callbacks=callbacks)


@pytest.mark.parametrize("what", ["projector", "all"])
def test_measuring_changes_no_bit_of_a_run_and_measures_the_model_of_that_step(world: World, unseen: TokenTable, what: str) -> None:
    heldout = measure_on(world, unseen)
    plain, history = attempt(world, what, None, None)
    watched, same = attempt(world, what, heldout, None)
    assert same == history
    assert bits(watched) == bits(plain)
    assert watched.training
    assert [row["step"] for row in heldout.rows] == [1, 3, 5]
    at_the_end = measure_on(world, unseen)
    at_the_end.measure(plain, STEPS - 1, show=False)
    assert at_the_end.rows == heldout.rows[-1:]
    assert len({row["loss"] for row in heldout.rows}) == 3
    assert [len(row["answers"]) for row in heldout.rows] == [2, 2, 2]


def test_the_last_step_is_measured_whatever_the_stride() -> None:
    heldout = Heldout(lambda _: 1.0, every=4)
    assert [made for made in range(1, STEPS + 1) if heldout.is_due(made, last=made == STEPS)] == [4, 6]


def scripted() -> Heldout:
    """Losses that follow from the step, so that the best is known; `rows` grows by one a step."""
    heldout = Heldout(lambda _: CURVE[len(heldout.rows)], every=1, keep_best=True)
    return heldout


@pytest.fixture(scope="module")
def weights_by_step(world: World) -> list[dict[str, bytes]]:
    """What an undisturbed run's weights are after each step."""
    found: list[dict[str, bytes]] = []

    def keep(model: VisionLanguageModel) -> float:
        found.append(bits(model))
        return 1.0

    attempt(world, "projector", Heldout(keep, every=1), None)
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 99])
def test_a_run_that_is_stopped_anywhere_ends_with_its_best_weights(
    world: World, tmp_path: Path, weights_by_step: list[dict[str, bytes]], stride: int
) -> None:
    """The best step is made in one attempt, the rest in others; the first of equal losses is the best."""
    resume = TrainingState(tmp_path, "t", {"k": 1})
    stops = 0
    while True:
        heldout = scripted()
        checkpointer = Stopping(resume, stride, heldout=heldout)
        try:
            model, _ = attempt(world, "projector", heldout, checkpointer)
            break
        except PipelineError:
            stops += 1
    assert stops == (STEPS - 1) // stride
    assert [row["loss"] for row in heldout.rows] == CURVE
    assert heldout.best == {"step": 1, "loss": 3.0}
    assert bits(model) == weights_by_step[-1]
    checkpointer.take_best(model, accelerator())
    assert bits(model) == weights_by_step[1]
    assert sorted(path.name for path in resume.folder.iterdir()) == ["00000002", "00000006"], "the best and the last"


class Killed(Exception):
    """As SIGKILL: nothing of ours runs after it."""


@pytest.mark.parametrize("killed_after", range(1, STEPS))
def test_a_run_that_is_killed_right_after_a_measurement_measures_it_again(
    world: World, tmp_path: Path, weights_by_step: list[dict[str, bytes]], killed_after: int
) -> None:
    """Between the measurement and the state that would hold it."""
    resume = TrainingState(tmp_path, "t", {"k": 1})

    class Dying(Checkpointer):
        def after_step(self, model: object, optimizer: object, history: list[object], *rest: object, **options: object) -> None:
            if len(history) == killed_after:
                raise Killed
            super().after_step(model, optimizer, history, *rest, **options)  # type: ignore[arg-type]

    heldout = scripted()
    with pytest.raises(Killed):
        attempt(world, "projector", heldout, Dying(resume, minutes=60, heldout=heldout))
    heldout = scripted()
    checkpointer = Checkpointer(resume, minutes=60, heldout=heldout)
    model, history = attempt(world, "projector", heldout, checkpointer)
    checkpointer.take_best(model, accelerator())
    assert len(history) == STEPS
    assert [row["loss"] for row in heldout.rows] == CURVE
    assert bits(model) == weights_by_step[1]


@pytest.mark.parametrize("stride", [1, 3])
def test_answers_on_the_way_are_the_same_file_however_often_a_run_is_stopped(
    world: World, tmp_path: Path, unseen: TokenTable, stride: int
) -> None:
    undisturbed = measure_on(world, unseen)
    attempt(world, "all", undisturbed, None)
    undisturbed.write_answers(tmp_path / "one.json", [{"question": "What?"}])
    resume = TrainingState(tmp_path, "t", {"k": 1})
    while True:
        heldout = measure_on(world, unseen)
        try:
            attempt(world, "all", heldout, Stopping(resume, stride, heldout=heldout))
            break
        except PipelineError:
            continue
    heldout.write_answers(tmp_path / "other.json", [{"question": "What?"}])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    found = json.loads((tmp_path / "one.json").read_text())
    assert [row["step"] for row in found["measured"]] == [1, 3, 5]
    assert len({json.dumps(row["answers"]) for row in found["measured"]}) > 1, "the model learns to say something else"


def test_without_best_only_the_last_state_is_kept(world: World, tmp_path: Path, unseen: TokenTable) -> None:
    resume, heldout = TrainingState(tmp_path, "t", {"k": 1}), measure_on(world, unseen)
    checkpointer = Checkpointer(resume, minutes=0, heldout=heldout)
    model, _ = attempt(world, "projector", heldout, checkpointer)
    before = bits(model)
    checkpointer.take_best(model, accelerator())
    assert bits(model) == before
    assert [path.name for path in resume.folder.iterdir()] == ["00000006"]


def test_a_best_state_that_is_damaged_is_one_line(world: World, tmp_path: Path) -> None:
    resume, heldout = TrainingState(tmp_path, "t", {"k": 1}), scripted()
    checkpointer = Checkpointer(resume, minutes=60, heldout=heldout)
    model, _ = attempt(world, "projector", heldout, checkpointer)
    (resume.folder / "00000002/state.safetensors").write_bytes(b"half")
    with pytest.raises(PipelineError, match=r"00000002/state\.safetensors: has 4 bytes.*remove .* run again"):
        checkpointer.take_best(model, accelerator())


def test_a_held_out_loss_that_is_no_number_stops(world: World) -> None:
    with pytest.raises(PipelineError, match="held-out loss nan after step 0") as caught:
        attempt(world, "projector", Heldout(lambda _: float("nan"), every=1), None)
    assert caught.value.code == NUMERIC


def test_the_best_of_nothing_measured_is_refused() -> None:
    content = read_yaml(Path(__file__).parents[3] / "params.yaml")
    override(content, ["sft.keep=best"])
    with pytest.raises(PipelineError, match=r"params\.yaml: sft\.keep is best.*set evaluate\.every"):
        check(content, where="params.yaml")
    override(content, ["evaluate.every=100"])
    check(content, where="params.yaml")


def test_the_curve_is_a_csv(tmp_path: Path) -> None:
    rows = json.loads('[{"step": 1, "loss": 0.25, "answers": ["x"]}, {"step": 3, "loss": 0.5}]')  # as it comes back from a state
    write_losses(tmp_path / "a/heldout.csv", rows)
    assert (tmp_path / "a/heldout.csv").read_text().split() == ["step,loss", "1,0.25", "3,0.5"]
    write_losses(tmp_path / "heldout.csv", [])
    assert (tmp_path / "heldout.csv").read_text().split() == ["step,loss"]


def test_the_first_process_says_what_it_found(capsys: pytest.CaptureFixture[str], world: World) -> None:
    heldout = scripted()
    for step in range(3):
        heldout.measure(world.model(), step, show=step < 2)
    said = capsys.readouterr().out.splitlines()
    assert said == ["held-out loss 5.0000 after step 0 (the best so far)", "held-out loss 3.0000 after step 1 (the best so far)"]
