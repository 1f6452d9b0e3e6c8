"""Whole stages in several processes: they end as one does, go on in another number, and stop without leaving any behind."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROWS, row
from projects import with_path
from safetensors.torch import load_file
from test_distributed import CLOSE, CLOSE_WEIGHTS, RANKS, contents, difference
from test_run import ROOT, stage

from pipeline.core.errors import ARTEFACT, BAD_ROWS, INTERRUPTED
from pipeline.params.reading import override, read_yaml
from pipeline.vlm.training.checkpointing import Checkpointer
from pipeline.vlm.training.state import TrainingState


def set_params(folder: Path, *changes: str) -> None:
    from ruamel.yaml import YAML

    path = folder / "params.yaml"
    content = read_yaml(path if path.exists() else ROOT / "params.yaml")
    override(content, list(changes))
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)


@pytest.fixture(scope="module")
def untrained(
    png: Callable[[int], bytes], vision_folders: dict[str, Path], llm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two dozen conversations about a dozen pictures, six held out; nothing has run yet."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("data/images", "data/models", ".dvc"):
        (folder / name).mkdir(parents=True)
    (folder / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    (folder / "data/models/clip").symlink_to(vision_folders["clip"])
    (folder / "data/models/llm").symlink_to(llm_folder)
    for number in range(18):
        (folder / "data/images" / f"{number}.png").write_bytes(png(number))
    one_each = [row("<image>\nWhat is this?", f"It is a red circle, {number}.", f"{number}.png") for number in range(18)]
    for name, rows in (("rows", [*ROWS, *one_each[:12]]), ("heldout", one_each[12:])):
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.{use}.images=data/images" for use in ("pretrain", "sft", "heldout")]
    data += [f"data.{use}.records=data/rows.jsonl" for use in ("pretrain", "sft")] + ["data.heldout.records=data/heldout.jsonl"]
    training = [
        f"{name}.{change}"
        for name in ("pretrain", "sft")
        for change in ("batch_size=4", "micro_tokens=90", "precision=float32", "share_images=true")
    ]
    runtime = ["runtime.save_minutes=0", "runtime.workers=0", "runtime.extract_batch=2", "vision.shard_rows=4"]
    set_params(folder, *data, *training, *runtime, "pretrain.epochs=12", "evaluate.max_new_tokens=4")
    return folder


@pytest.fixture(scope="module")
def alone(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after all stages in one process."""
    folder = tmp_path_factory.mktemp("alone") / "project"
    shutil.copytree(untrained, folder, symlinks=True)
    for name in ("extract", "tokenize", "pretrain", "sft"):
        finish(stage(name, folder))
    return folder


@pytest.fixture
def project(untrained: Path, tmp_path: Path) -> Path:
    """A fresh copy of the project, for two processes."""
    shutil.copytree(untrained, tmp_path / "project", symlinks=True)
    set_params(tmp_path / "project", f"runtime.processes={RANKS}")
    return tmp_path / "project"


def finish(running: subprocess.Popen[str], code: int = 0) -> str:
    """What it said on stderr; no process of its making may be left, and no traceback seen.

    What torchrun's agent logs when another machine has ended a moment earlier is not ours, and no failure.
    """
    _, err = running.communicate(timeout=120)
    assert running.returncode == code, err
    assert "Traceback" not in re.sub(r"^E\d+ .*torch/distributed/elastic/agent/.*\n", "", err, flags=re.MULTILINE)
    return err


def take(alone: Path, project: Path) -> None:
    """Give a project the inputs of training that one process made."""
    for name in ("features", "tokens"):
        shutil.copytree(alone / "data" / name, project / "data" / name)
    shutil.copytree(alone / "data/features_meta", project / "data/features_meta")


def assert_trained_alike(one: Path, other: Path, name: str) -> None:
    histories = [list(csv.DictReader((folder / f"results/{name}/history.csv").open())) for folder in (one, other)]
    assert len(histories[0]) == len(histories[1])
    for here, there in zip(*histories, strict=True):
        assert [float(x) for x in there.values()] == pytest.approx([float(x) for x in here.values()], rel=CLOSE)
    files = sorted(path.name for path in (one / "models" / name).glob("*.safetensors"))
    assert files
    for file in files:
        assert difference(*(load_file(folder / "models" / name / file) for folder in (one, other))) < CLOSE_WEIGHTS
    figures = [json.loads((folder / f"metrics/{name}.json").read_text()) for folder in (one, other)]
    for key in ("accuracy", "accuracy_blind", "questions", "steps"):
        assert figures[0][key] == figures[1][key]
    for key in ("loss", "train_loss"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=CLOSE)
    assert not list((other / ".dvc/tmp/resume").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("divided", [False, True])
def test_all_stages_in_two_processes_end_as_in_one(alone: Path, project: Path, divided: bool) -> None:
    set_params(project, f"runtime.fsdp={divided}")
    for name in ("extract", "tokenize"):
        finish(stage(name, project))
        assert contents(project / "data/features") == contents(alone / "data/features")
    assert contents(project / "data/tokens") == contents(alone / "data/tokens")
    for name in ("pretrain", "sft"):
        finish(stage(name, project))
        assert_trained_alike(alone, project, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [((RANKS, False), (1, False)), ((1, False), (RANKS, True)), ((RANKS, True), (RANKS, False))]
)
def test_a_run_that_was_stopped_goes_on_in_another_number_of_processes(
    alone: Path, project: Path, first: tuple[int, bool], then: tuple[int, bool]
) -> None:
    take(alone, project)
    set_params(project, f"runtime.processes={first[0]}", f"runtime.fsdp={first[1]}")
    running = stage("pretrain", project)
    stop_after(running, project, 5, signal.SIGTERM)
    assert "state saved" in finish(running, code=143 if first[0] > 1 else INTERRUPTED)
    set_params(project, f"runtime.processes={then[0]}", f"runtime.fsdp={then[1]}")
    running = stage("pretrain", project)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert out.count("resume: going on after step") == 1
    assert_trained_alike(alone, project, "pretrain")


def on_two_machines(name: str, trees: list[Path]) -> list[subprocess.Popen[str]]:
    """A stage under torchrun as two machines would start it, each in a work tree of its own, over the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    environment = {**os.environ, "PYTHONPATH": with_path(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [*command, "--node_rank", str(rank), "-m", f"stages.{name}"],
            cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, tree in enumerate(trees)
    ]  # fmt: skip


def two_trees(untrained: Path, folder: Path) -> list[Path]:
    """Two work trees with the same data, and a store that both see."""
    trees = [folder / "one", folder / "two"]
    for tree in trees:
        shutil.copytree(untrained, tree, symlinks=True)
        set_params(tree, f"runtime.feature_stores=[{folder / 'store'}]")
    return trees


@pytest.mark.slow
def test_two_machines_with_a_work_tree_each_and_one_store_end_as_two_processes_of_one_do(
    untrained: Path, project: Path, tmp_path: Path
) -> None:
    """Every file of both trees, bit for bit; a run that was stopped goes on in both."""
    trees = two_trees(untrained, tmp_path)
    for running in on_two_machines("extract", trees):
        finish(running)
    for tree in (*trees, project):
        if tree is project:
            finish(stage("extract", tree))
        finish(stage("tokenize", tree))
    stop_and_go_on("pretrain", trees)
    finish(stage("pretrain", project))
    for name in ("data/features", "data/features_meta", "data/tokens", "models/pretrain", "results/pretrain"):
        expected = contents(project / name)
        assert expected
        assert [contents(tree / name) for tree in trees] == [expected, expected], name
    for tree in trees:
        assert json.loads((tree / "metrics/pretrain.json").read_text())["steps"] > 0
        assert (tree / "metrics/extract.json").exists()
        assert not list((tree / ".dvc/tmp/resume").iterdir())


@pytest.mark.slow
def test_sft_on_two_machines_with_a_work_tree_each_ends_as_two_processes_of_one_do(
    untrained: Path, alone: Path, project: Path, tmp_path: Path
) -> None:
    """The live encoder reads each tree's own pictures, also after a stop: every file of both trees, bit for bit."""
    trees = two_trees(untrained, tmp_path)
    for tree in (*trees, project):
        take(alone, tree)
        shutil.copytree(alone / "models/pretrain", tree / "models/pretrain")
        set_params(tree, "sft.epochs=6")
    finish(stage("sft", project))
    stop_and_go_on("sft", trees)
    for name in ("models/sft", "results/sft"):
        expected = contents(project / name)
        assert expected
        for tree in trees:
            found = contents(tree / name)
            assert [file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file)] == [], (name, tree)


@pytest.mark.slow
def test_two_machines_whose_work_trees_differ_are_told_in_what(untrained: Path, alone: Path, tmp_path: Path) -> None:
    trees = two_trees(untrained, tmp_path)
    for tree in trees:
        take(alone, tree)
    set_params(trees[1], "pretrain.lr=2e-3")
    for each in on_two_machines("pretrain", trees):
        _, err = each.communicate(timeout=120)
        assert each.returncode != 0
        assert "differ in schedule" in err


def stop_and_go_on(stage_name: str, trees: list[Path]) -> None:
    """A stage in both trees, stopped once both have saved three steps, then to its end."""
    running = on_two_machines(stage_name, trees)
    while not all(any(int(path.name) >= 3 for path in tree.glob(".dvc/tmp/resume/*/[0-9]*")) for tree in trees):
        assert all(each.poll() is None for each in running), [each.communicate()[1] for each in running]
        time.sleep(0.01)
    for each in running:
        each.send_signal(signal.SIGTERM)
    for each in running:
        each.communicate(timeout=120)
    for running_again in on_two_machines(stage_name, trees):
        finish(running_again)


def stop_after(running: subprocess.Popen[str], project: Path, steps: int, number: signal.Signals) -> list[psutil.Process]:
    """Send a signal once so many steps are saved; returns all processes that the run had."""
    while not any(int(path.name) >= steps for path in project.glob(".dvc/tmp/resume/*/[0-9]*")):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    running.send_signal(number)
    return family


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family[1:], timeout=30)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_stopped_or_killed_leaves_no_process(alone: Path, project: Path, number: signal.Signals) -> None:
    take(alone, project)
    set_params(project, "pretrain.epochs=200")  # so that it is not over before the signal, however busy the machine is
    running = stage("pretrain", project, TMPDIR=str(project))  # a killed launcher leaves its folder
    family = stop_after(running, project, 2, number)
    assert len(family) > RANKS
    err = finish(running, code={signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number])
    assert_gone(family)
    assert "state saved" in only_error(err)


def test_a_signal_that_comes_in_several_copies_asks_once(tmp_path: Path) -> None:
    """A launcher's threads die one by one, and each death tells its children."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        Checkpointer(TrainingState(tmp_path, "t", {}), minutes=0)
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "sft"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_the_system_kills_is_named(name: str, rank: str, alone: Path, project: Path) -> None:
    """As it does when memory runs out. The other one ends with it: `finish` waits for two minutes, gloo would for thirty."""
    take(alone, project)
    if name == "sft":
        shutil.copytree(alone / "models/pretrain", project / "models/pretrain")
    set_params(project, f"{name}.epochs=200")
    running = stage(name, project)
    family = stop_after(running, project, 2, signal.SIGCONT)
    next(process for process in family[1:] if process.environ().get("RANK") == rank).kill()
    assert only_error(finish(running, code=128 + 9)).startswith(f"error: process {int(rank) + 1} was ended by SIGKILL")
    assert_gone(family)
    assert not (project / "models" / name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["0.png", "7.png"])
def test_a_bad_picture_ends_all_processes_with_one_line(project: Path, picture: str) -> None:
    """The first shard is the first process's, the second the other's, whose words must come through all the same."""
    (project / "data/images" / picture).write_bytes(b"no picture")
    err = finish(stage("extract", project), code=BAD_ROWS)
    assert f"'{picture}': not a picture" in only_error(err)
    assert not (project / "data/features").exists()


@pytest.mark.slow
def test_a_process_that_fails_while_others_wait_for_its_gradient_ends_the_launch(alone: Path, project: Path) -> None:
    take(alone, project)
    shutil.copytree(alone / "models", project / "models")
    (project / "data/images/7.png").write_bytes((project / "data/images/8.png").read_bytes())
    err = finish(stage("sft", project), code=ARTEFACT)
    assert "7.png': its bytes are not those that were tokenised" in only_error(err)


@pytest.mark.slow
def test_a_mistake_that_all_processes_see_is_said_once(project: Path) -> None:
    err = finish(stage("pretrain", project), code=ARTEFACT)
    assert only_error(err).startswith("error: data/tokens/pretrain.arrow:")


def only_error(err: str) -> str:
    (line,) = [line for line in err.splitlines() if "error" in line.lower()]
    return line[line.index("error: ") :]
