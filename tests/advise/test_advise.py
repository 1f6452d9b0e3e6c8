"""`python -m pipeline.advise`: seconds that follow from measured ones, break-even, and the command on a whole project."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import World
from projects import Project
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.advise import advise, as_lines, command
from pipeline.advise.verdict import choose
from pipeline.check import Rates, Work, encodings, extraction_seconds
from pipeline.check.costs import PictureTime
from pipeline.core.errors import PipelineError

CARD = Rates(PictureTime(0.002, 0.004, beside=True), writing=0.001, from_memory=0.0001, from_disk=0.02)
CPU_ONLY = replace(CARD, picture=replace(CARD.picture, beside=False))
WORK = Work("pretrain", "projector", rows=1000, pictures=1000, fresh=1000, visits=1000, kept=0, epochs=2, step=0.01)


@pytest.mark.parametrize("rates", [CARD, CPU_ONLY])
def test_extraction_is_what_check_says_of_it_and_its_writing(rates: Rates) -> None:
    unwritten = replace(rates, writing=0.0)
    assert extraction_seconds(unwritten, 1000) == pytest.approx(1000 * rates.picture.extraction)
    assert extraction_seconds(rates, 1000) == pytest.approx(4.0 if rates is CARD else 7.0)


def test_the_cache_is_ahead_from_the_epoch_at_which_what_it_saves_has_paid_for_extraction() -> None:
    # a CPU: extraction 7 s, then an epoch saves 6 s of 16
    found = choose(CPU_ONLY, WORK, in_memory=True)
    assert (found.extract, found.stored, found.live) == pytest.approx((7.0, 20.0, 32.0))
    assert (found.ahead_from, found.runs, found.pays) == (2, 1, True)
    assert not choose(CPU_ONLY, replace(WORK, epochs=1), in_memory=True).pays
    for epochs in (1, 2, 3):  # as if each number had been asked for alone
        assert choose(CPU_ONLY, replace(WORK, epochs=epochs), in_memory=True).pays == (epochs >= 2)


def test_a_card_that_the_encoder_does_not_slow_gains_nothing() -> None:
    idle = replace(CARD, picture=PictureTime(0.002, 0.0, beside=True))
    found = choose(idle, WORK, in_memory=True)
    assert found.live == found.stored
    assert (found.ahead_from, found.runs, found.pays) == (None, None, False)


def test_a_store_beyond_memory_is_read_from_disk_in_every_epoch() -> None:
    assert choose(CARD, WORK, in_memory=False).stored == pytest.approx(2 * 1000 * 0.0199)  # the disk is slower than the steps
    assert choose(CPU_ONLY, WORK, in_memory=False).stored == pytest.approx(20.0 + 2 * 1000 * 0.0199)


@pytest.mark.parametrize("kept", [0, 100, 250, 400, 500])
def test_what_a_live_run_encodes_is_what_a_cache_of_the_rows_seen_last_leaves(kept: int) -> None:
    pictures, epochs = 500, 8
    rng, held, encoded = np.random.default_rng(0), OrderedDict[int, None](), 0
    for _ in range(epochs):
        for picture in rng.permutation(pictures).tolist():
            encoded += picture not in held
            held[picture] = None
            held.move_to_end(picture)
            while len(held) > kept:
                held.popitem(last=False)
    work = replace(WORK, rows=pictures, pictures=pictures, visits=pictures, kept=kept)
    assert encodings(work, epochs) == pytest.approx(encoded, rel=0.02)


@pytest.fixture
def project(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "SECONDS", 0.0)
    made = Project(world, tmp_path)
    for number in range(4):
        (made.pictures / f"{number}.png").write_bytes(world.images.read(f"{number}.png"))
    talk = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A red circle."}]
    rows = [{"conversations": talk, "image": f"{number % 3}.png"} for number in range(9)]
    made.write("pretrain.jsonl", rows)
    made.write("sft.jsonl", [*rows, {"conversations": talk, "image": "3.png"}])
    made.write("heldout.jsonl", rows[:1])
    return made


def test_data_are_counted_a_sample_is_timed_and_nothing_is_left(project: Project) -> None:
    before = sorted(project.folder.rglob("*"))
    found = advise(project.params)
    assert [(work.rows, work.pictures, work.fresh) for work in found.work] == [(9, 3, 3), (10, 4, 1)]
    assert found.disk == 3 * 16 * 32 * 2
    measured = [found.rates.picture.decoding, found.rates.picture.encoding, found.rates.writing, found.rates.from_disk]
    assert min(*measured, *(work.step for work in found.work)) > 0
    assert found.work[0].visits <= 9, "rows about one picture ask once where they share it"
    said = "\n".join(as_lines(found))
    assert "pretrain, 9 rows, 1 epoch" in said
    assert "1 of its pictures are not in data.pretrain" in said
    assert "vision.storage=int8" in said
    assert sorted(project.folder.rglob("*")) == before


def test_other_values_are_tried_from_the_command_line_and_faults_are_one_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (project.folder / "params.yaml").open("w") as file:
        YAML().dump(project.content, file)
    (project.folder / "dvc.yaml").write_text("stages: {}\n")
    with monkeypatch.context() as patched:
        patched.setattr(command, "as_lines", lambda params: [f"{params.vision.storage}, {params.pretrain.epochs}"])
        patched.setattr(command, "advise", lambda params: params)
        ran = CliRunner().invoke(command.app, ["vision.storage=int8", "pretrain.epochs=7"])
    assert (ran.exit_code, ran.output) == (0, "int8, 7\n")
    for wrong, said in (("pretrain.epoch=7", "pretrain.epoch"), ("data.pretrain.records=nowhere.jsonl", "nowhere.jsonl")):
        ran = CliRunner().invoke(command.app, [wrong])
        assert ran.exit_code
        assert said in ran.output
        assert len([line for line in ran.output.splitlines() if line.startswith("error: ")]) == 1


def test_data_without_pictures_are_said_to_have_none(project: Project) -> None:
    talk = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A red circle."}]
    project.write("pretrain.jsonl", [{"conversations": talk}])
    with pytest.raises(PipelineError, match="no row shows a picture"):
        advise(project.params)
