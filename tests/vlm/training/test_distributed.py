"""Several processes give what one gives: two of them, on the CPU with gloo, started by the library's own launcher.

This file is also what those processes run (`python -m test_distributed`): the cases below, on the world of the tests.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import CPU, PATCHES, World
from safetensors.torch import load_file, save_file
from test_loop import SCHEDULE

from pipeline.core.files import write_json
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.encoding import Encoding
from pipeline.features.extraction import Processes, extract
from pipeline.features.sources import StoredFeatures
from pipeline.features.store.store import FeatureStore
from pipeline.records.images import ImageRoot
from pipeline.text.builder import PromptBuilder
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.loader import plan_micro_batches
from pipeline.vlm.batches.schedule import Execution
from pipeline.vlm.batches.sharing import find_sharing
from pipeline.vlm.evaluation.answering import Answering, answer_questions
from pipeline.vlm.evaluation.heldout import Heldout
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.evaluation.questions import find_questions
from pipeline.vlm.model.sharding import gather_weights, gathered
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.loop import train

RANKS = 2

# Eleven rows in steps of 5, 5 and 1: the last has nothing for the second process. Pieces of one or two rows.
SCHEDULE_OF_PIECES = replace(SCHEDULE, batch_size=5, micro_tokens=70)

# The order of sums is all that differs. Measured: 2e-6 of a loss or gradient norm, 8e-6 of a tensor, since AdamW makes a
# whole step of the least gradient. A gradient that is not sharded rightly shows as 1e-2 or more.
CLOSE, CLOSE_WEIGHTS = 1e-5, 5e-5


@dataclass(frozen=True, slots=True)
class Case:
    """A training run: what trains, whether rows about one picture share it, whether the model is a mixture of experts."""

    what: str
    shared: bool = False
    mixture: bool = False
    sharded: bool = False


CASES = {
    "projector": Case("projector"),
    "projector-shared": Case("projector", shared=True),
    "all": Case("all"),
    "all-shared": Case("all", shared=True),
    "mixture": Case("all", mixture=True),
    "projector-sharded": Case("projector", sharded=True),
    "all-shared-sharded": Case("all", shared=True, sharded=True),
    "mixture-sharded": Case("all", mixture=True, sharded=True),
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
    examples = Examples(world.table, source, world.builder.image_id, find_sharing(world.table) if case.shared else None)
    sharded = case.sharded and accelerator.num_processes > 1

    def measure(model: VisionLanguageModel) -> float:
        """Row by row: eleven, so one process has a pass more."""
        return heldout_loss(model, examples, accelerator, micro_tokens=1, even=sharded)

    asking, asked = Answering(max_new_tokens=4, batch_size=2, tokens=999), find_questions(world.table)

    def answer(model: VisionLanguageModel) -> list[str]:
        with gathered(model):
            return answer_questions(model, examples, accelerator, world.builder, replace(asking, alike=True), asked[:3])

    measured = Heldout(measure, every=4, answer=answer)
    execution, callbacks = Execution(sharded=sharded), Callbacks(heldout=measured)
    history = train(model, examples, SCHEDULE_OF_PIECES, accelerator, execution=execution, callbacks=callbacks)
    if sharded:
        assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
        model = gather_weights(model, world.model(case.what, llm=mixture if case.mixture else None))
    heldout = heldout_loss(model, examples, accelerator, micro_tokens=70)
    assert [row["step"] for row in measured.rows] == [3, 5]
    assert measured.rows[-1]["loss"] == pytest.approx(heldout, rel=1e-6)
    answers = answer_questions(model, examples, accelerator, world.builder, asking, asked)
    assert measured.rows[-1]["answers"] == answers[:3]
    return Outcome(history, heldout, answers, {name: t.detach().clone() for name, t in model.state_dict().items()})


class Counting(Encoder):
    """Remembers what it was asked to encode."""

    def begin(self, pixels: torch.Tensor, names: Sequence[str]) -> Encoding:
        self.__dict__.setdefault("seen", []).extend(names)
        return super().begin(pixels, names)


def encode(images: ImageRoot, clip: Path, out: Path, shard_rows: int, processes: Processes) -> list[str]:
    """Extract to `out`; returns the pictures that this process has encoded."""
    encoder = Counting(str(clip), precision="float32", device=CPU, batch=4)
    files, hashes = distinct_images([(images, [f"{number}.png" for number in range(6)])])
    options: dict[str, Any] = {"stores": [out / "store"], "out": out / "features", "shard_rows": shard_rows, "workers": 0}
    extract(files, hashes, encoder, **options, processes=processes)
    return encoder.__dict__.get("seen", [])


def world_of(folder: Path, llm: Path) -> World:
    """The tests' world as another process has left it in a folder, without an encoder."""
    builder = PromptBuilder(str(llm), image_token="<image>", tokens=PATCHES)
    table, store = TokenTable(folder / "rows.arrow"), FeatureStore(folder / "features")
    return World(folder, ImageRoot(folder / "images"), None, builder, table, store, llm)  # type: ignore[arg-type]


def main(folder: Path) -> None:
    """What each process does: every case, its results under `folder`/case/rank."""
    torch.set_num_threads(1)
    paths = {name: Path(path) for name, path in json.loads((folder / "paths.json").read_text()).items()}
    world = world_of(paths["world"], paths["llm"])
    accelerator = Accelerator(cpu=True)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for name, case in CASES.items():
        outcome, out = run(world, paths["mixture"], case), folder / name / str(rank)
        out.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in outcome.weights.items()}, out / "weights.safetensors")
        write_json(out / "rest.json", [outcome.history, outcome.heldout, outcome.answers])
    for name, rows in SHARDS.items():
        (folder / name).mkdir(exist_ok=True)
        processes = Processes(rank, ranks, accelerator.wait_for_everyone)
        write_json(folder / name / f"seen.{rank}.json", encode(world.images, paths["clip"], folder / name, rows, processes))
    accelerator.end_training()


@pytest.fixture(scope="module")
def together(world: World, moe_folder: Path, vision_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left their results."""
    folder = tmp_path_factory.mktemp("together")
    paths = {"world": world.folder, "llm": world.llm, "mixture": moe_folder, "clip": vision_folders["clip"]}
    write_json(folder / "paths.json", {name: str(path) for name, path in paths.items()})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RESULTS": str(folder)}
    command = [sys.executable, "-c", f"from stages.launch import launch; launch('test_distributed', {RANKS})"]
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


@pytest.mark.slow
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
    plans = [
        list(plan_micro_batches(table, SCHEDULE_OF_PIECES, 0, sharing=sharing, rank=rank, ranks=RANKS)) for rank in range(RANKS)
    ]
    steps = [[work.parts for work in plan if work.last] for plan in plans]
    assert any(mine != others for mine, others in zip(*steps, strict=True))
    assert any(work.weight == 0 for work in plans[1])
    assert not any(work.weight == 0 for work in plans[0])
    texts = [all(not len(table.row(int(n)).image_start) for unit in work.units for n in unit) for plan in plans for work in plan]
    assert any(texts)
    assert not all(texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDS)
def test_two_processes_write_the_shards_of_one_and_encode_every_picture_once(
    world: World, vision_folders: dict[str, Path], together: Path, tmp_path: Path, name: str
) -> None:
    encode(world.images, vision_folders["clip"], tmp_path, SHARDS[name], Processes())
    assert contents(together / name / "features") == contents(tmp_path / "features")
    parts = [json.loads((together / name / f"seen.{rank}.json").read_text()) for rank in range(RANKS)]
    assert len(parts[0]) + len(parts[1]) == len({*parts[0], *parts[1]}) == 6
    assert name == "3-shards" or sorted(map(len, parts)) == [0, 6], "a shard is one process's"


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
            return encode(world.images, vision_folders["clip"], tmp_path, 1, Processes(rank, RANKS, wait))
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


if __name__ == "__main__":
    main(Path(os.environ["RESULTS"]))
