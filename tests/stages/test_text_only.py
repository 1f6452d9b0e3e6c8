"""Data sets without a picture, and long stretches of text in others: what each stage makes of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import World, row
from projects import Project

from pipeline.core.errors import PipelineError
from pipeline.features.distinct import distinct_images
from pipeline.records.images import ImageRoot

TEXT = [row("Is there a square?", "Yes."), row("Is it red?", "No."), row("Which colour?", "Blue.")]
SHOWN = [row(f"<image>\nWhat is this {n}?", "A square.", f"{n % 4}.png") for n in range(12)]
HELD = [row("<image>", "A dog.", "5.png"), *TEXT]


@pytest.fixture
def made(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]) -> Project:
    monkeypatch.chdir(tmp_path)
    project = Project(world, tmp_path)
    for number in range(6):
        (project.pictures / f"{number}.png").write_bytes(png(number))
    project.write("pretrain.jsonl", SHOWN)
    project.write("heldout.jsonl", HELD)
    return project


def test_a_stretch_of_text_longer_than_an_arrow_batch_trains(made: Project) -> None:
    made.write("sft.jsonl", SHOWN[:6] + TEXT * 700 + SHOWN[6:])
    made.set("sft.batch_size=600", "sft.micro_tokens=20000", "sft.share_images=auto")
    figures = made.run("extract", "tokenize", "pretrain", "sft")
    assert figures["questions"] == 4
    assert np.isfinite(figures["train_loss"])
    slots = [int(starts[0][-1] - starts[0][0]) for _, _, starts in made.table("sft").parts()]
    assert slots == [6, 0, 6], "or no batch is without a picture"


def test_a_data_set_of_text_alone_trains_the_language_model_and_measures_it(made: Project) -> None:
    made.write("sft.jsonl", TEXT * 4)
    made.write("heldout.jsonl", TEXT)
    figures = made.run("extract", "tokenize", "pretrain", "sft")
    assert figures["accuracy"] == figures["accuracy_blind"], "there is nothing to be blind to"
    made.set("sft.features=stored")
    assert made.run("sft")["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    made.set("sft.train=projector")
    with pytest.raises(PipelineError, match=r"data\.sft: .*no row shows a picture"):
        made.run("sft")


def test_pretraining_data_without_a_picture_stop_the_first_stage(made: Project) -> None:
    made.write("pretrain.jsonl", TEXT)
    made.write("sft.jsonl", SHOWN)
    with pytest.raises(PipelineError, match=r"data\.pretrain: data/mine/pretrain\.jsonl: no row shows a picture") as caught:
        made.run("extract")
    assert len(caught.value.line().splitlines()) == 1


def test_pretraining_data_whose_rows_with_pictures_are_all_refused_stop_the_second(made: Project) -> None:
    made.write("pretrain.jsonl", [*SHOWN, *TEXT])
    made.write("sft.jsonl", SHOWN)
    made.set("tokenize.max_tokens=40", "tokenize.too_long=skip")
    made.write("heldout.jsonl", TEXT)
    made.run("extract")
    with pytest.raises(PipelineError, match=r"data\.pretrain: .*no row shows a picture"):
        made.run("tokenize")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_sources_without_a_picture_change_nothing_for_the_others(world: World, place: int) -> None:
    root, sources = ImageRoot(world.folder / "images"), [["0.png", "1.png"], ["1.png", "2.png"]]
    expected = distinct_images([(root, names) for names in sources])
    sources.insert(place, [])
    files, hashes = distinct_images([(root, names) for names in sources])
    assert [file.name for file in files] == [file.name for file in expected[0]] == ["0.png", "1.png", "2.png"]
    assert np.array_equal(hashes, expected[1])
    assert distinct_images([(root, [])] * 2)[1].shape == (0, 32)
    assert distinct_images([])[1].shape == (0, 32)
