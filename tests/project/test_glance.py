"""`glance`: every command under one name, and `new` and `use`, which write what one could write by hand."""

import csv
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from projects import ROOT, with_path

from pipeline.core import PipelineError
from pipeline.glance import COMMANDS, IMPORTS
from pipeline.params import check, read_yaml
from pipeline.project.files import Files, in_params
from pipeline.project.models import list_model_folders
from pipeline.project.new import _new
from pipeline.project.plan import find_records
from pipeline.project.use import take
from pipeline.records import digest
from pipeline.records.formats.split import is_held_out


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's two files and models, and no data; the test runs in it."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/models").symlink_to(ROOT / "data/models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.check.training.CHEAP", 0)  # training is timed by tests of the check
    return tmp_path


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": with_path(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pipeline.glance", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)


def new(*records: str, pictures: str = "photos", yes: bool = True, dry_run: bool = False) -> None:
    """The command in this process: starting torch for each test would take longer than the test."""
    _new(Path(pictures), [Path(name) for name in records], None, yes=yes, dry_run=dry_run)


def own_pictures(folder: Path, png: Callable[[int], bytes], count: int) -> Path:
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for number in range(count):
            (folder / f"{number}.png").write_bytes(png(number))
            table.writerow([f"{number}.png", f"Number {number}."])
    return folder


def test_a_folder_of_pictures_and_captions_becomes_params_that_every_stage_takes(
    project: Path, png: Callable[[int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = own_pictures(project / "photos", png, 30)
    new(dry_run=True)
    assert (project / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()
    capsys.readouterr()
    new()
    said = capsys.readouterr().out
    assert "30, all good" in said
    assert "\npretrain: " in said
    assert " steps, then " in said
    assert f"glance chat photos/{min(path.name for path in pictures.glob('*.png'))}" in said
    content = read_yaml(project / "params.yaml")
    check(content, where="params.yaml")
    assert content["data"]["sft"] == {
        "records": "photos/captions.csv", "images": "photos", "prompt": "<image>\nDescribe the picture.",
    }  # fmt: skip
    assert content["data"]["pretrain"] == {"records": "photos/captions.csv", "images": "photos"}
    assert 0 < content["data"]["heldout"]["share"] < 0.5
    text = (project / "params.yaml").read_text()
    assert all(line.partition("#")[2] in text for line in (ROOT / "params.yaml").read_text().splitlines() if "#" in line)
    new()
    assert "stay as they are" in capsys.readouterr().out


def test_captions_train_the_projector_and_conversations_the_model(
    project: Path, png: Callable[[int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    own_pictures(project / "photos", png, 12)
    talk = '{"messages":[{"role":"user","content":"<image>What?"},{"role":"assistant","content":"It."}],"images":["%d.png"]}'
    (project / "talks.jsonl").write_text("\n".join(talk % number for number in range(12)) + "\n{broken\n")
    new("photos/captions.csv", "talks.jsonl")
    data = read_yaml(project / "params.yaml")["data"]
    assert (data["pretrain"]["records"], data["sft"]["records"]) == ("photos/captions.csv", "talks.jsonl")
    assert data["heldout"]["records"] == "talks.jsonl"
    assert "prompt" not in data["sft"]
    assert data["on_error"] == "skip"
    assert "1 rows cannot be used" in capsys.readouterr().out


BAD_TABLES = {
    "two/a.csv": "file_name,caption\n",
    "two/b.csv": "file_name,caption\n",
    "absent/captions.csv": "file_name,caption\nx.png,An x.\n",
    "several/rows.csv": 'image,question,answer\n"a.png,b.png",Same?,No.\n',
    "named/list.csv": "photo,description\na.png,An a.\n",
    "sheet/captions.xlsx": "PK",
    "ansi/captions.csv": "file_name;caption\nx.png;schön\n",  # as Excel writes it by itself
    "bare/x.png": "",
    "lone/captions.csv": "file_name,caption\n0.png,A nought.\n",
}


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", "empty"),
        ("two", "holds several tables: a.csv, b.csv -> name those to take with --records"),
        ("photos", "nobody is here to say yes -> add --yes"),
        ("zipped.zip", "a zip of pictures: its captions are a file of their own -> glance new zipped.zip --records captions.csv"),
        ("absent", "no row can be used; the first, absent/captions.csv:2: absent: 'x.png': no such image -> mend or remove"),
        ("several", """-> several pictures are a list, in JSON lines: {"images": ["a.png", "b.png"], ...}"""),
        ("named", "-> --column turns=NAME, or --column question=NAME and --column answer=NAME, or --column text=NAME"),
        ("sheet", "sheet/captions.xlsx: a spreadsheet, which is not read -> save it as captions.csv (CSV UTF-8)"),
        ("ansi", "ansi/captions.csv:2: not UTF-8 -> save the file as UTF-8 (in Excel: CSV UTF-8)"),
        ("bare", "-> put captions.csv into it (file_name,caption), or a .txt beside each picture, or name a file with --records"),
        ("lone", "lone/captions.csv: one usable picture: none is left to measure on -> bring a second one at least"),
    ],
)
def test_a_mistake_is_said_and_nothing_is_written(
    project: Path, png: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch, pictures: str, said: str
) -> None:
    own_pictures(project / "photos", png, 2)
    (project / "empty").mkdir()
    for name, table in BAD_TABLES.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(table, encoding="cp1252")
    (project / "lone/0.png").write_bytes(png(0))
    with zipfile.ZipFile(project / "zipped.zip", "w") as archive:
        archive.writestr("0.png", png(0))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(PipelineError) as caught:
        new(pictures=pictures, yes=False)
    assert said in caught.value.line()
    assert (project / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"), [(["chta"], "Did you mean 'chat'?"), (["import"], "glance import FILE_OR_FOLDER OUT")]
)
def test_a_command_that_there_is_not_is_told(arguments: list[str], said: str) -> None:
    done = run(*arguments, folder=ROOT)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("project")
def test_what_is_no_model_is_refused_with_those_that_are_ready() -> None:
    with pytest.raises(PipelineError, match=r"ready are llava-1\.5, minimind-v-2025"):
        take(Files(), "nonsense")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "docs/params").glob("*.yaml")))
def test_every_ready_file_can_be_taken_and_the_data_section_stays(project: Path, name: str) -> None:
    files = Files()
    before = files.plain_params()
    take(files, name)
    files.write()
    after, wanted = read_yaml(project / "params.yaml"), read_yaml(ROOT / "docs/params" / f"{name}.yaml")
    assert {key: after[key] for key in ("data", "evaluate", "runtime")} == {
        key: before[key] for key in ("data", "evaluate", "runtime")
    }
    assert {key: after[key] for key in ("vision", "llm", "projector")} == {
        key: wanted[key] for key in ("vision", "llm", "projector")
    }
    deps = [dep for stage in read_yaml(project / "dvc.yaml")["stages"].values() for dep in stage["deps"]]
    assert not any(dep.startswith("data/models") for dep in deps)


def test_a_folder_becomes_a_dependency_of_the_stages_that_read_it_and_going_back_restores_both_files(project: Path) -> None:
    (project / "mine").mkdir()
    for source in (ROOT / "data/models/llm").iterdir():
        (project / "mine" / source.name).symlink_to(source)
    files = Files()
    assert "llama language model" in take(files, "mine")
    files.write()
    stages = read_yaml(project / "dvc.yaml")["stages"]
    assert [name for name, stage in stages.items() if "mine" in stage["deps"]] == ["tokenize", "pretrain", "sft"]
    assert not any("data/models/llm" in stage["deps"] for stage in stages.values())
    files = Files()
    take(files, "data/models/llm")
    files.write()
    for name in ("params.yaml", "dvc.yaml"):
        assert (project / name).read_text() == (ROOT / name).read_text()


def test_a_folder_that_the_other_model_still_needs_stays_a_dependency() -> None:
    dvc = {"stages": {name: {"deps": ["both", "stages/x.py"]} for name in ("extract", "tokenize", "pretrain", "sft")}}
    params: Any = {"vision": {"model": "both"}, "llm": {"model": "org/other"}}
    list_model_folders(params, dvc, {"vision": "both", "llm": "both"})
    kept = [name for name, stage in dvc["stages"].items() if "both" in stage["deps"]]
    assert kept == ["extract", "pretrain", "sft"]


def test_paths_outside_the_project_are_absolute_since_experiments_run_elsewhere(project: Path, tmp_path: Path) -> None:
    assert in_params(Path("photos/../photos/a")) == "photos/a"
    assert in_params(tmp_path.parent / "photos") == str(tmp_path.parent / "photos")
    with pytest.raises(PipelineError, match="no such file"):
        find_records(project / "nowhere", [])


def test_every_command_of_the_contents_is_there() -> None:
    for name, (module, _, _) in COMMANDS.items():
        if name != "import":
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    assert all((ROOT / parts[0].replace(".", "/")).parent.is_dir() for parts in IMPORTS.values())


@pytest.mark.parametrize("command", ["params"])
def test_a_command_has_its_own_help(command: str) -> None:
    done = run(command, "--help", folder=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_what_a_sweep_would_go_without_is_said_with_the_command(
    project: Path, png: Callable[[int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (project / ".dvc").mkdir()
    subprocess.run(["git", "init", "-q"], check=True)
    own_pictures(project / "my photos", png, 8)
    new(pictures="my photos")
    said = capsys.readouterr().out
    assert "dvc exp run --queue" in said
    assert "dvc add 'my photos' && git commit -m 'Track my photos'" in said
    assert "dvc add 'my photos/" not in said


def test_columns_with_names_of_their_own_are_given_on_the_command_line(project: Path, png: Callable[[int], bytes]) -> None:
    table = own_pictures(project / "photos", png, 12) / "captions.csv"
    table.write_text(table.read_text().replace("file_name,caption", "photo,description"))
    _new(Path("photos"), [], None, columns=["images=photo", "text=description"], yes=True, dry_run=False)
    data = read_yaml(project / "params.yaml")["data"]
    assert [data[name]["columns"] for name in ("pretrain", "sft", "heldout")] == [{"images": "photo", "text": "description"}] * 3
    for wrong in ("description", "caption=description", "text="):
        with pytest.raises(PipelineError, match="PART is one of turns, images, text"):
            _new(Path("photos"), [], None, columns=[wrong], yes=True, dry_run=False)


def test_of_few_pictures_one_is_held_out_and_the_others_are_trained_on(project: Path, png: Callable[[int], bytes]) -> None:
    own_pictures(project / "photos", png, 5)
    new()
    heldout = check(read_yaml(project / "params.yaml"), where="params.yaml").data.heldout
    keys = [digest(png(number)) for number in range(5)]
    assert sum(is_held_out(key, share=heldout.share, seed=heldout.seed) for key in keys) == 1


def test_leaving_the_question_writes_nothing(
    project: Path, png: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_pictures(project / "photos", png, 2)

    class Left(io.StringIO):
        """A terminal whose person presses Ctrl-D."""

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Left())
    new(yes=False)
    assert capsys.readouterr().out.endswith("nothing is written\n")
    assert (project / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()
