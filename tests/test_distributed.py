"""Several processes give what one gives: two of them, on the CPU with gloo, started by the library's own launcher.

This file is also what those processes run (`python -m test_distributed`): the cases below, on the world of the tests.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import CPU, PATCHES, ROWS, World, row
from safetensors.torch import load_file, save_file
from test_stage import ROOT, stage
from test_training import SCHEDULE

from pipeline.dividing import gather
from pipeline.errors import ARTEFACT, BAD_ROWS, INTERRUPTED
from pipeline.evaluate import answer_accuracy, heldout_loss
from pipeline.extraction import distinct_images, extract
from pipeline.features import FeatureStore
from pipeline.files import write_json
from pipeline.heldout import Heldout
from pipeline.images import ImageRoot
from pipeline.keeper import Keeper
from pipeline.model import VisionLanguageModel
from pipeline.params import override, read_yaml
from pipeline.resume import Resume
from pipeline.sharing import find_sharing
from pipeline.sources import StoredFeatures
from pipeline.text import PromptBuilder
from pipeline.tokens import TokenTable
from pipeline.training import plan_work, train
from pipeline.vision import Encoder

RANKS = 2
# Eleven rows in steps of 5, 5 and 1: the last has nothing for the second process. Pieces of one or two rows.
SCHEDULE_OF_PIECES = replace(SCHEDULE, batch_size=5, micro_tokens=70)
# The order of sums is all that differs. Measured: 2e-6 of a loss or gradient norm, 8e-6 of a tensor, since AdamW makes a
# whole step of the least gradient. A gradient that is not divided rightly shows as 1e-2 or more.
CLOSE, CLOSE_WEIGHTS = 1e-5, 5e-5


@dataclass(frozen=True, slots=True)
class Case:
    """A training run: what trains, whether rows about one picture share it, whether the model is a mixture of experts."""

    what: str
    shared: bool = False
    mixture: bool = False
    divided: bool = False


CASES = {
    "projector": Case("projector"),
    "projector-shared": Case("projector", shared=True),
    "all": Case("all"),
    "all-shared": Case("all", shared=True),
    "mixture": Case("all", mixture=True),
    "projector-divided": Case("projector", divided=True),
    "all-shared-divided": Case("all", shared=True, divided=True),
    "mixture-divided": Case("all", mixture=True, divided=True),
}
SHARDS = {"3-shards": 2, "1-shard": 6}  # rows of a shard; six pictures: one process has two or none of the shards


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run ends with."""

    history: list[dict[str, float]]
    heldout: float
    answers: list[str]
    weights: dict[str, torch.Tensor]


def run(world: World, mixture: Path, case: Case) -> Outcome:
    """Train and measure, in this process or in this one of several."""
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    model = world.model(case.what, llm=mixture if case.mixture else None)
    if case.mixture:
        model.language_model.config.router_aux_loss_coef = 0.0  # a router's loss is a mean of each piece: see docs/distributed.md
    source = StoredFeatures(world.store, world.table)
    options: dict[str, Any] = {"image_id": world.builder.image_id, "sharing": find_sharing(world.table) if case.shared else None}
    divided = case.divided and accelerator.num_processes > 1

    def measure(model: VisionLanguageModel) -> float:
        """Row by row: eleven, so one process has a pass more."""
        return heldout_loss(model, world.table, source, accelerator, micro_tokens=1, even=divided, **options)

    measured = Heldout(measure, every=4)
    history = train(
        model, world.table, source, SCHEDULE_OF_PIECES, accelerator, name="t", heldout=measured, divided=divided, **options
    )
    if divided:
        assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
        model = gather(model, world.model(case.what, llm=mixture if case.mixture else None))
    heldout = heldout_loss(model, world.table, source, accelerator, micro_tokens=70, **options)
    assert [row["step"] for row in measured.rows] == [3, 5]
    assert measured.rows[-1]["loss"] == pytest.approx(heldout, rel=1e-6)
    asked: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 2, "blind": False, "name": "t"}
    _, answers = answer_accuracy(model, world.table, source, accelerator, world.builder, **asked)
    return Outcome(history, heldout, answers, {name: t.detach().clone() for name, t in model.state_dict().items()})


class Counting(Encoder):
    """Remembers what it was asked to encode."""

    def encode_rows(self, pixels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        self.__dict__.setdefault("seen", []).extend(names)
        return super().encode_rows(pixels, names)


def encode(images: ImageRoot, clip: Path, out: Path, shard_rows: int, **processes: Any) -> list[str]:
    """Extract to `out`; returns the pictures that this process has encoded."""
    encoder = Counting(str(clip), precision="float32", device=CPU, batch=4)
    files, hashes = distinct_images([(images, [f"{number}.png" for number in range(6)])])
    options: dict[str, Any] = {"stores": [out / "store"], "out": out / "features", "shard_rows": shard_rows, "workers": 0}
    extract(files, hashes, encoder, **options, **processes)
    return encoder.__dict__.get("seen", [])


def main(folder: Path) -> None:
    """What each process does: every case, its results under `folder`/case/rank."""
    torch.set_num_threads(1)
    paths = {name: Path(path) for name, path in json.loads((folder / "paths.json").read_text()).items()}
    builder = PromptBuilder(str(paths["llm"]), image_token="<image>", tokens=PATCHES)
    table, store = TokenTable(paths["world"] / "rows.arrow"), FeatureStore(paths["world"] / "features")
    world = World(paths["world"], ImageRoot(paths["world"] / "images"), None, builder, table, store, paths["llm"])  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for name, case in CASES.items():
        outcome, out = run(world, paths["mixture"], case), folder / name / str(rank)
        out.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in outcome.weights.items()}, out / "weights.safetensors")
        write_json(out / "rest.json", [outcome.history, outcome.heldout, outcome.answers])
    for name, rows in SHARDS.items():
        (folder / name).mkdir(exist_ok=True)
        processes = {"rank": rank, "ranks": ranks, "wait": accelerator.wait_for_everyone}
        write_json(folder / name / f"seen.{rank}.json", encode(world.images, paths["clip"], folder / name, rows, **processes))
    accelerator.end_training()


@pytest.fixture(scope="module")
def together(world: World, moe_folder: Path, vision_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left their results."""
    folder = tmp_path_factory.mktemp("together")
    paths = {"world": world.folder, "llm": world.llm, "mixture": moe_folder, "clip": vision_folders["clip"]}
    write_json(folder / "paths.json", {name: str(path) for name, path in paths.items()})
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "RESULTS": str(folder)}
    command = [sys.executable, "-c", f"from pipeline.launch import launch; launch('test_distributed', {RANKS})"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def outcomes(folder: Path) -> list[Outcome]:
    """What each process has left."""
    found = []
    for out in (folder / "0", folder / "1"):
        history, heldout, answers = json.loads((out / "rest.json").read_text())
        found.append(Outcome(history, heldout, answers, load_file(out / "weights.safetensors")))
    return found


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12)) for name in one)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_measure_as_one(world: World, moe_folder: Path, together: Path, name: str) -> None:
    """History, weights, held-out loss and answers; the frozen language model meets pieces without a picture too."""
    alone, (first, second) = run(world, moe_folder, CASES[name]), outcomes(together / name)
    assert len(alone.history) == len(first.history) == 6
    for here, there in zip_longest(alone.history, first.history):
        assert there == pytest.approx(here, rel=CLOSE)
    assert difference(alone.weights, first.weights) < CLOSE_WEIGHTS
    assert first.heldout == pytest.approx(alone.heldout, rel=CLOSE)
    assert first.answers == alone.answers
    assert len(set(alone.answers)) > 1, "answers that are all alike would compare nothing"
    assert (first.history, first.heldout, first.answers) == (second.history, second.heldout, second.answers)
    assert difference(first.weights, second.weights) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_the_cases_hold_what_is_hard_to_divide(world: World, shared: bool) -> None:
    """Unequal numbers of pieces, a step with fewer rows than processes, and text alone in a process's part of a step."""
    table, sharing = world.table, find_sharing(world.table) if shared else None
    plans = [list(plan_work(table, SCHEDULE_OF_PIECES, 0, sharing=sharing, rank=rank, ranks=RANKS)) for rank in range(RANKS)]
    steps = [[work.parts for work in plan if work.last] for plan in plans]
    assert any(mine != others for mine, others in zip(*steps, strict=True))
    assert any(work.share == 0 for work in plans[1])
    assert not any(work.share == 0 for work in plans[0])
    texts = [all(not len(table.row(int(n)).image_start) for unit in work.units for n in unit) for plan in plans for work in plan]
    assert any(texts)
    assert not all(texts)


@pytest.mark.parametrize("name", SHARDS)
def test_two_processes_write_the_shards_of_one_and_encode_every_picture_once(
    world: World, vision_folders: dict[str, Path], together: Path, tmp_path: Path, name: str
) -> None:
    encode(world.images, vision_folders["clip"], tmp_path, SHARDS[name])
    assert contents(together / name / "features") == contents(tmp_path / "features")
    parts = [json.loads((together / name / f"seen.{rank}.json").read_text()) for rank in range(RANKS)]
    assert len(parts[0]) + len(parts[1]) == len({*parts[0], *parts[1]}) == 6
    assert [len(part) for part in parts] == ([4, 2] if name == "3-shards" else [6, 0])


def test_processes_divide_one_list_of_shards_though_one_of_them_comes_late(
    world: World, vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The late one must not take shards that another has written in the meantime for known ones."""
    arrived, barrier = threading.Event(), threading.Barrier(RANKS)

    def wait() -> None:
        arrived.set()
        barrier.wait(60)

    def part(rank: int) -> list[str]:
        try:
            return encode(world.images, vision_folders["clip"], tmp_path, 1, rank=rank, ranks=RANKS, wait=wait)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(RANKS) as pool:
        first = pool.submit(part, 0)
        assert arrived.wait(60)
        seen = pool.submit(part, 1).result() + first.result()
    assert len(seen) == len(set(seen)) == 6


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Whole stages, in a folder that looks like the project's root, with the tests' tiny models


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
    """What it said on stderr; no process of its making may be left, and no traceback seen."""
    _, err = running.communicate(timeout=120)
    assert running.returncode == code, err
    assert "Traceback" not in err
    return err


def take(alone: Path, project: Path) -> None:
    """Give a project the inputs of training that one process made."""
    for name in ("features", "tokens"):
        shutil.copytree(alone / "data" / name, project / "data" / name)
    shutil.copy(alone / "data/features_meta.json", project / "data")


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
    set_params(project, f"runtime.divided={divided}")
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
    set_params(project, f"runtime.processes={first[0]}", f"runtime.divided={first[1]}")
    running = stage("pretrain", project)
    stop_after(running, project, 5, signal.SIGTERM)
    assert "state saved" in finish(running, code=143 if first[0] > 1 else INTERRUPTED)
    set_params(project, f"runtime.processes={then[0]}", f"runtime.divided={then[1]}")
    running = stage("pretrain", project)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert out.count("resume: going on after step") == 1
    assert_trained_alike(alone, project, "pretrain")


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
        Keeper(Resume(tmp_path, "t", {}), minutes=0)
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_process_that_the_system_kills_is_named(alone: Path, project: Path) -> None:
    """As it does when memory runs out."""
    take(alone, project)
    running = stage("pretrain", project)
    family = stop_after(running, project, 2, signal.SIGCONT)
    next(process for process in family[1:] if process.environ().get("RANK") == "1").kill()
    assert only_error(finish(running, code=128 + 9)).startswith("error: process 2 was ended by SIGKILL")
    assert_gone(family)


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["0.png", "7.png"])
def test_a_bad_picture_ends_all_processes_with_one_line(project: Path, picture: str) -> None:
    """The first shard is the first process's, the second the other's, whose words must come through all the same."""
    (project / "data/images" / picture).write_bytes(b"no picture")
    err = finish(stage("extract", project), code=BAD_ROWS)
    assert f"{picture}: not a picture" in only_error(err)
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


if __name__ == "__main__":
    main(Path(os.environ["RESULTS"]))
