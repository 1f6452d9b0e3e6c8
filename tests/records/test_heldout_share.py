"""`data.heldout.share`: a seeded part of the pictures is held out by content, the same part in every stage."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import World, row
from projects import Project

from pipeline.core.errors import PipelineError
from pipeline.export.proof import heldout_rows
from pipeline.features.store.store import FeatureStore
from pipeline.records.formats.split import is_held_out
from pipeline.records.images import digest

Png = Callable[[int], bytes]
COUNT = 30


@pytest.fixture
def project(world: World, png: Png, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Thirty pictures, some under two names; captions of some, conversations about the others and rows about two or none."""
    monkeypatch.chdir(tmp_path)
    made = Project(world, tmp_path)
    for number in range(COUNT):
        for name in (f"{number}.png", f"copy of {number}.png"):
            (made.pictures / name).write_bytes(png(number))
    captions = [row("<image>", f"A circle, {number}.", f"copy of {number}.png") for number in range(20)]
    talk = [row("<image>\nWhat is this?", f"It is {number}.", f"{number}.png") for number in range(10, COUNT)]
    both = [row("<image><image>", "Two.", f"{number}.png", f"{number + 1}.png") for number in range(10, COUNT, 2)]
    text = [row(f"Is there a square, {number}?", "Yes.") for number in range(12)]
    made.write("pretrain.jsonl", captions)
    made.write("sft.jsonl", [*talk, *both, *text])
    made.content["data"]["heldout"]["records"] = "data/mine/sft.jsonl"
    made.set("data.heldout.share=0.4")
    return made


def shown(project: Project, name: str) -> set[bytes]:
    return {key.tobytes() for key in project.table(name).image_hashes()}


def test_no_picture_is_on_both_sides_and_every_row_is_counted(
    project: Project, png: Png, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run("extract")
    figures = project.run("tokenize")
    held = shown(project, "heldout")
    assert 3 < len(held) < 17, "0.4 of the 20 pictures that are talked about"
    assert all(is_held_out(key, share=0.4, seed=0) for key in held)
    for name in ("pretrain", "sft"):
        assert not any(is_held_out(key, share=0.4, seed=0) for key in shown(project, name))
        assert shown(project, name), "and something is left to train on"
    assert {digest(png(number)) for number in range(10, COUNT)} == shown(project, "sft") | held
    for name, rows in (("pretrain", 20), ("sft", 42), ("heldout", 42)):
        found = figures[name]
        assert found["rows_in"] == rows == found["rows"] + found["other_side"] + found["both_sides"]
        assert found["rows"] == len(project.table(name))
    assert figures["sft"]["rows"] == figures["heldout"]["other_side"]
    assert figures["sft"]["both_sides"] == figures["heldout"]["both_sides"] > 0
    assert figures["pretrain"]["both_sides"] == 0
    texts = [
        row for name in ("sft", "heldout") for row in range(len(project.table(name))) if not project.table(name).row(row).slots
    ]
    assert len(texts) == 12
    said = capsys.readouterr().out
    assert f"{figures['sft']['other_side']} are held out, {figures['sft']['both_sides']} have pictures of both sides" in said

    store = FeatureStore("data/features")
    assert set(map(bytes, np.concatenate([shard.hashes for shard in store.shards]))) == shown(project, "pretrain") | held
    assert project.run("pretrain")["questions"] == project.run("sft")["questions"] == figures["heldout"]["rows"]


def test_rows_may_come_and_go_and_a_picture_stays_where_it_was(project: Project) -> None:
    project.run("extract", "tokenize")
    before = {name: shown(project, name) for name in ("sft", "heldout")}
    project.write("sft.jsonl", [row("<image>", "Blue.", f"copy of {number}.png") for number in reversed(range(COUNT))])
    project.run("extract", "tokenize")
    after = {name: shown(project, name) for name in ("sft", "heldout")}
    assert before["sft"] < after["sft"]
    assert before["heldout"] < after["heldout"]
    project.content["data"]["heldout"]["seed"] = 1
    project.run("extract", "tokenize")
    assert shown(project, "heldout") != after["heldout"]


def test_a_bad_picture_is_listed_with_the_side_it_is_on(project: Project) -> None:
    project.set("data.on_error=skip", "data.max_bad_share=0.5")
    rows = [row("<image>", f"A circle, {number}.", f"{number}.png") for number in range(COUNT)]
    torn = {f"{number}.png": b"torn %d" % number for number in range(0, COUNT, 3)}
    for name, content in torn.items():
        (project.pictures / name).write_bytes(content)
    project.write("sft.jsonl", [*rows, row("<image>", "Red.", "missing.png")])
    project.run("extract")
    figures = project.run("tokenize")
    sides = {
        side: {name for name in torn if is_held_out(digest(torn[name]), share=0.4, seed=0) == (side == "heldout")}
        for side in ("sft", "heldout")
    }
    for side, names in sides.items():
        listed = project.listed(f"tokens/rejected_{side}.csv")
        assert {line["reason"].split("'")[1] for line in listed} == names | {"missing.png"}, "nobody knows on which side it is"
        found = figures[side]
        assert found["rows_in"] == COUNT + 1 == found["rows"] + found["rejected"] + found["other_side"]


def test_without_a_share_the_same_rows_on_both_sides_are_refused(project: Project) -> None:
    project.set("data.heldout.share=0.0")
    project.run("extract")
    with pytest.raises(PipelineError, match=r"training images are held out, first in data/mine/pretrain\.jsonl:11"):
        project.run("tokenize")


@pytest.mark.parametrize(("share", "said"), [(0.001, "none of 42 rows is held out"), (0.999, "none of 20 rows is left")])
def test_a_share_that_leaves_one_side_empty_names_the_knob(project: Project, share: float, said: str) -> None:
    project.set(f"data.heldout.share={share}")
    project.run("extract")
    with pytest.raises(PipelineError, match=rf"{said}.*data\.heldout\.share"):
        project.run("tokenize")


@pytest.mark.parametrize("share", ["1.0", "-0.1", "yes", ".nan"])
def test_a_share_that_is_none_is_refused(project: Project, share: str) -> None:
    project.set(f"data.heldout.share={share}")
    with pytest.raises(PipelineError, match=r"data\.heldout\.share"):
        _ = project.params


def test_an_export_is_proved_and_shown_on_rows_that_are_held_out(project: Project) -> None:
    project.set("data.on_error=skip", "data.max_bad_share=0.9")
    (project.pictures / "11.png").write_bytes(b"torn")
    heldout = project.params.data.heldout
    rows = heldout_rows(heldout, 100)
    project.run("extract", "tokenize")
    table = project.table("heldout")
    held = {table.where(number) for number in range(len(table))}
    assert len(rows) > 3
    assert {row.record.where for row in rows} <= held
