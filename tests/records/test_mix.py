"""`data.*.mix`: patterns below one folder that DVC watches, with weights, their own pictures and their own formats."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import World, row
from projects import ROOT, Project
from ruamel.yaml import YAML

from pipeline.core.errors import PipelineError
from pipeline.params.reading import check
from pipeline.params.schema import Dataset
from pipeline.records.datasets import open_dataset
from pipeline.records.record import Record

Png = Callable[[int], bytes]


@pytest.fixture
def project(world: World, png: Png, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A LLaVA array, own rows in two folders and a caption table, the pictures of each elsewhere."""
    monkeypatch.chdir(tmp_path)
    made = Project(world, tmp_path)
    for number in range(12):
        (made.pictures / f"{number}.png").write_bytes(png(number))
    (made.pictures / "coco").mkdir()
    for number in range(3):
        (made.pictures / "coco" / f"{number}.png").write_bytes(png(100 + number))
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "It is a red circle."}]
    made.write("train/llava/a.json", [])
    array = [{"id": number, "image": f"{number}.png", "conversations": talk} for number in range(3)]
    (tmp_path / "data/mine/train/llava/a.json").write_text(json.dumps(array))
    made.write("train/own/b.jsonl", [row("<image>", "Blue.", "3.png"), row("Is there a square?", "Yes.")])
    made.write("train/own/deep/c.jsonl", [row("<image>", "A yellow triangle.", "4.png")])
    (tmp_path / "data/mine/train/captions.csv").write_text("file_name;said\n" + "".join(f"{n}.png;A square.\n" for n in range(3)))
    made.write("heldout.jsonl", [row("<image>", "Blue.", "11.png")])
    for name in ("pretrain", "sft"):
        made.content["data"][name] |= {"records": "data/mine/train", "mix": mix()}
    return made


def mix(**changes: Any) -> dict[str, Any]:
    captions = {"weight": 1, "images": "coco", "columns": {"text": "said"}, "prompt": "<image>\nDescribe the image."}
    return {"llava/*.json": 1.0, "own/**/*.jsonl": 2.0, "captions.csv": captions} | changes


def dataset(project: Project, parts: dict[str, Any], **changes: Any) -> Dataset:
    content = {**project.content, "data": {**project.content["data"]}}
    content["data"]["sft"] = {**content["data"]["sft"], "mix": parts, **changes}
    return check(content, where="params.yaml").data.sft


def rows_of(given: Dataset, limit: int = 0) -> list[Record]:
    rows = list(open_dataset(given, limit=limit).records())
    assert not [row for row in rows if not isinstance(row, Record)], rows
    return [row for row in rows if isinstance(row, Record)]


def test_every_stage_reads_the_mixture(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.run("extract")["images"] == 3 + 2 + 3 + 1
    figures = project.run("tokenize")
    table = project.table("sft")
    assert figures["sft"]["rows"] == len(table) == 3 + 2 * 3 + 3
    taken = Counter(table.where(number).rpartition(":")[0].removeprefix("data/mine/train/") for number in range(len(table)))
    assert taken == {"llava/a.json": 3, "own/b.jsonl": 4, "own/deep/c.jsonl": 2, "captions.csv": 3}
    assert "data/mine/train/own/**/*.jsonl: 6 rows taken of 3" in capsys.readouterr().out
    assert {name.as_py() for name in table.image_names()} >= {"0:0.png", "1:4.png", "2:0.png"}
    first, captions = table.image_hashes()[0], table.image_hashes()[-1]
    assert (first != captions).any()
    assert project.run("pretrain")["steps"] == 3
    assert project.run("sft")["steps"] == 3, "live, so every picture is found again under its name"


def test_a_list_of_files_is_a_mix_of_their_names_in_that_order(project: Project) -> None:
    rows = rows_of(dataset(project, {"own/deep/c.jsonl": 1, "own/b.jsonl": 1}))
    assert [row.where for row in rows] == [f"data/mine/train/own/{name}" for name in ("deep/c.jsonl:1", "b.jsonl:1", "b.jsonl:2")]


def test_a_fraction_is_drawn_by_the_seed_and_the_limit_holds_for_each_part(project: Project) -> None:
    project.write("train/own/many.jsonl", [row(f"Is it {number}?", "Yes.") for number in range(400)])
    quarter = [row.where for row in rows_of(dataset(project, {"own/many.jsonl": 0.25}))]
    assert 70 < len(quarter) < 130
    assert quarter == [row.where for row in rows_of(dataset(project, {"own/many.jsonl": 0.25}))]
    assert quarter != [row.where for row in rows_of(dataset(project, {"own/many.jsonl": 0.25}, seed=1))]
    assert len(rows_of(dataset(project, {"own/many.jsonl": 1, "own/b.jsonl": 1}), limit=1)) == 2


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"own/*.parquet": 1}, r"data/mine/train/own/\*\.parquet: no file matches -> correct data\.\*\.mix"),
        ({"own/b.json": 1}, r"data/mine/train/own/b\.json: no such file -> correct data\.\*\.mix"),
        ({"own/*.jsonl": 1, "**/b.jsonl": 2}, r"own/b\.jsonl: is met by 'own/\*\.jsonl' and by '\*\*/b\.jsonl'"),
        ({"/etc/*.jsonl": 1}, r"data\.sft\.mix\./etc/\*\.jsonl: expected a path below"),
        ({"own/../../*.jsonl": 1}, r"expected a path below the data set's own, without \.\."),
        ({"own/*.jsonl": {"images": "../elsewhere"}}, r"mix\.own/\*\.jsonl\.images: expected a path below"),
        ({"own/*.jsonl": {"images": "nowhere"}}, r"data/mine/pictures/nowhere: no such folder or zip"),
        ({"own/*.jsonl": 0}, r"mix\.own/\*\.jsonl\.weight: expected greater than 0"),
        ({"own/*.jsonl": "2"}, r"mix\.own/\*\.jsonl: expected a weight, or a section with one"),
        ({"own/*.jsonl": {"wieght": 1}}, r"unknown key data\.sft\.mix\.own/\*\.jsonl\.wieght"),
        ({}, r"data\.sft\.mix: .*at least 1 item"),
    ],
)
def test_a_mistake_names_the_pattern(project: Project, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(PipelineError, match=said) as caught:
        open_dataset(dataset(project, parts))
    assert len(caught.value.line().splitlines()) == 1


def test_a_pattern_where_dvc_wants_a_path_says_where_patterns_go(project: Project) -> None:
    with pytest.raises(PipelineError, match=r"a pattern, expected a path.*data\.\*\.mix"):
        open_dataset(Dataset(records="data/mine/train/own/*.jsonl", images="data/mine/pictures"))
    with pytest.raises(PipelineError, match="its mix is of files below it"):
        open_dataset(dataset(project, {"*.jsonl": 1}, records="data/mine/heldout.jsonl"))


def test_a_folder_with_brackets_in_its_name_is_no_pattern(project: Project) -> None:
    Path("data/mine/train").rename("data/mine/[train]")
    assert len(rows_of(dataset(project, {"own/*.jsonl": 1}, records="data/mine/[train]"))) == 2


@pytest.mark.slow
def test_dvc_runs_what_a_change_of_the_mixture_or_its_files_can_change(project: Project) -> None:
    """The real dvc over the real dvc.yaml: one dependency watches all files, the params watch the patterns."""
    for name in ("pipeline", "stages"):
        (project.folder / name).symlink_to(ROOT / name)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, project.folder / name)
    dvc(project, "init", "--no-scm", "-q")

    def repro() -> list[str]:
        return [line.split("'")[1] for line in dvc(project, "repro").splitlines() if line.startswith("Running stage")]

    everything = ["extract", "tokenize", "pretrain", "sft"]
    assert repro() == everything
    assert repro() == []
    project.content["data"]["sft"]["mix"] = mix(**{"llava/*.json": 3.0})
    assert repro() == ["tokenize", "pretrain", "sft"], "the tokens of all data sets are one output"
    project.write("train/own/deep/new.jsonl", [row("<image>", "None.", "5.png")])
    assert repro() == everything
    project.content["data"]["sft"]["mix"] = mix(**{"own/*.parquet": 1.0})
    assert "own/*.parquet: no file matches -> correct data.*.mix" in dvc(project, "repro", code=255)


def dvc(project: Project, *arguments: str, code: int = 0) -> str:
    with (project.folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(project.content, file)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "DVC_STUDIO_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["dvc", *arguments]
    done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
