"""What the report says to do next: commands that fit the run's data."""

import shlex
from pathlib import Path

import pytest
from made_results import Results, results  # noqa: F401

from pipeline.report.hints import hints


def asked(lines: list[str]) -> list[str]:
    return shlex.split(next(line for line in lines if line.startswith("glance chat ")).split("  ")[0])


def test_own_data_are_asked_about_with_a_heldout_picture_and_its_question(results: Results) -> None:
    assert asked(hints()) == ["glance", "chat", "PICTURE", "Describe the picture."], "before there are answers"
    results.write("sft", results.rows())
    assert asked(hints()) == ["glance", "chat", "data/pictures/0.png", "What color is it?"]
    (results.folder / "data/pictures/0.png").rename(results.folder / "data/pictures/else.png")
    assert asked(hints())[2] == "data/pictures/1.png"
    results.set("data.heldout.images=data/pictures.zip")
    assert asked(hints())[2] == "PICTURE"


def test_a_demo_picture_lies_beside_its_zip_and_is_asked_its_own_question(results: Results) -> None:
    results.set("data.heldout.images=data/easyvqa/images.zip")
    rows = results.rows()
    rows[3]["images"] = ["test/7.png"]
    results.write("sft", rows)
    (results.folder / "data/samples").mkdir()
    (results.folder / "data/samples/test-7.png").write_bytes(b"")
    assert asked(hints())[2:] == ["data/samples/test-7.png", rows[3]["question"]]


def test_a_way_of_trying_more_doubles_the_rate_that_was_taken(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    results.set("pretrain.lr=3e-4")
    assert any("-S pretrain.lr=0.0006" in line for line in hints())
    assert not any(line.startswith("source ") for line in hints())
    (results.folder / ".venv/bin").mkdir(parents=True)
    (results.folder / ".venv/bin/activate").touch()
    assert hints()[0].startswith("source .venv/bin/activate")
    monkeypatch.setattr("sys.prefix", str(results.folder / ".venv"))
    assert not any(line.startswith("source ") for line in hints())
    Path("params.yaml").write_text("data: [")
    assert hints() == []
