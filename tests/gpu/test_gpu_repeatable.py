"""Training on the device gives the same bits again: in another process, after a stop, and what is frozen keeps every byte.

This file is also what the other processes run (`python -m test_gpu_repeatable`).
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import test_state
import torch
from conftest import World
from gpu_device import (  # noqa: F401
    CLOSE,
    DEVICE,
    NEEDS_GPU,
    ON_GPU,
    forget_kernels,
    fresh_kernels,
    needs_gpu,
    run_on,
)
from test_distributed import difference, world_of
from test_loop import ENDS, SCHEDULE, bits, changed
from test_state import STEPS, Stopping, workspace  # noqa: F401

from pipeline.core.errors import INTERRUPTED, PipelineError
from pipeline.core.files import write_json
from pipeline.features.encoder.encoder import Encoder
from pipeline.vlm.batches.schedule import Execution
from pipeline.vlm.model.freezing import cast_frozen
from pipeline.vlm.model.sharding import gather_weights
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.state import TrainingState

PIECES = replace(SCHEDULE, micro_tokens=256)  # several passes a step
MODES = {"padded": Execution(), "packed": Execution(packed=True), "compiled": Execution(packed=True, compiled=True)}
PACKED_TOO = pytest.param("packed", marks=NEEDS_GPU)
either_mode = pytest.mark.parametrize("mode", ["padded", PACKED_TOO])

# What two processes train: packing needs a kernel, and compiling takes its time.
TOGETHER = {f"{mode} {what}": (mode, what) for mode in ("padded", "packed") for what in ("projector", "projector+ends", "all")}
TOGETHER["compiled all"] = "compiled", "all"


def main(folder: Path) -> None:
    """What each process does: encode the pictures and train in every mode; writes checksums of all that came of it."""
    torch.set_num_threads(1)
    paths = {name: Path(path) for name, path in json.loads((folder / "paths.json").read_text()).items()}
    world, found = world_of(paths["world"], paths["llm"]), {}
    for precision in ("float32", "auto"):
        encoder = Encoder(str(paths["clip"]), precision=precision, device=DEVICE, batch=4)
        files = [world.images.read(f"{number}.png") for number in range(6)]
        rows = encoder.encode_files(files, [str(number) for number in range(6)])
        found[f"features {precision}"] = hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
    for name, (mode, what) in TOGETHER.items():
        if mode == "padded" or ON_GPU:
            forget_kernels()
            model = world.model(what)
            history = run_on(world, model, PIECES, execution=MODES[mode])
            weights = hashlib.sha256(b"".join(bits(model.cpu()).values())).hexdigest()
            found[name] = json.dumps([history, weights])
    write_json(folder / f"{os.environ['NUMBER']}.json", found)


@pytest.fixture(scope="module")
def processes(world: World, vision_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What two processes at once have found; neither finds programs that the other has compiled."""
    folder = tmp_path_factory.mktemp("processes")
    write_json(folder / "paths.json", {"world": str(world.folder), "llm": str(world.llm), "clip": str(vision_folders["clip"])})
    command, running = [sys.executable, "-m", "test_gpu_repeatable"], []
    for number in "01":
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor{number}"), "TRITON_CACHE_DIR": str(folder / f"triton{number}")}
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, **cache, "PYTHONPATH": path, "RESULTS": str(folder), "NUMBER": number}
        running.append(
            subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return [json.loads((folder / f"{number}.json").read_text()) for number in "01"]


@pytest.mark.slow
def test_two_processes_encode_the_same_bits(processes: list[dict[str, str]]) -> None:
    one, other = ({name: found for name, found in run.items() if name.startswith("features")} for run in processes)
    assert one == other
    assert len(set(one.values())) == len(one) or DEVICE.type == "cpu", "on a GPU auto is not float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if mode == "padded" else NEEDS_GPU) for name, (mode, _) in TOGETHER.items()]
)
def test_two_processes_train_to_the_same_bits(processes: list[dict[str, str]], name: str) -> None:
    """The history, and every weight at the end."""
    assert processes[0][name] == processes[1][name]


@needs_gpu
@either_mode
@pytest.mark.parametrize("what", ["projector", "all"])
def test_two_runs_in_one_process_give_the_same_bits(world: World, what: str, mode: str) -> None:
    found = []
    for seed in (0, 0, 1):
        model = world.model(what)
        history = run_on(world, model, replace(PIECES, seed=seed), execution=MODES[mode])
        found.append((history, bits(model.cpu())))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1], "another seed gives other weights"


@pytest.mark.slow
@either_mode
@pytest.mark.parametrize("what", ["projector", "all"])
@pytest.mark.parametrize("precision", ["float32", *(pytest.param(name, marks=NEEDS_GPU) for name in ("bfloat16", "float16"))])
def test_a_run_that_is_stopped_again_and_again_ends_with_the_bits_of_an_undisturbed_one(
    world: World, tmp_path: Path, precision: str, what: str, mode: str
) -> None:
    """Weights, and a history without a gap; in float16 the scale of the gradients comes back too."""
    options = {"precision": precision, "execution": MODES[mode]}
    whole, codes = world.model(what), []
    history = run_on(world, whole, PIECES, **options)
    while True:
        model = world.model(what)
        callbacks = Callbacks(checkpointer=Stopping(TrainingState(tmp_path, "t", {"k": 1}), 2))
        try:
            pieces = run_on(world, model, PIECES, callbacks=callbacks, **options)
            break
        except PipelineError as error:
            codes.append(error.code)
    assert codes == [INTERRUPTED] * ((STEPS - 1) // 2)
    assert pieces == history
    assert bits(model.cpu()) == bits(whole.cpu())


@needs_gpu
@pytest.mark.slow
def test_a_stage_that_is_killed_ends_with_the_files_of_an_undisturbed_one(workspace: Path) -> None:
    """Three times with kill -9, on embedded data; `runtime.device: auto` is the GPU here."""
    test_state.test_a_killed_stage_ends_with_the_files_of_an_undisturbed_one(workspace, signal.SIGKILL, "last")


@either_mode
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=NEEDS_GPU)])
@pytest.mark.parametrize(("what", "prefixes"), [("projector", ("projector.",)), ("projector+ends", ENDS), ("all", ("",))])
def test_what_is_frozen_keeps_every_byte_and_gets_no_gradient(
    world: World, what: str, prefixes: tuple[str, ...], precision: str, mode: str
) -> None:
    """In bfloat16 what is frozen is held in bfloat16, as the stages hold it."""
    model = world.model(what)
    if precision == "bfloat16":
        cast_frozen(model, torch.bfloat16)
    before = as_bytes(model)
    run_on(world, model, precision=precision, execution=MODES[mode])
    after = as_bytes(model.cpu())
    assert changed(before, after) == {name for name in before if name.startswith(prefixes)}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def as_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    """As `bits`, of any number format."""
    return {name: t.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of one process, as FSDP needs it."""
    backend, store = "nccl" if ON_GPU else "gloo", torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@either_mode
@pytest.mark.parametrize("what", ["projector", "all"])
@pytest.mark.usefixtures("one_process")
def test_a_model_that_is_sharded_over_one_device_trains_as_a_plain_one(world: World, what: str, mode: str) -> None:
    """FSDP with nobody to share with: the same history and the same weights to rounding."""
    plain = world.model(what)
    history = run_on(world, plain, PIECES, execution=MODES[mode])
    model = world.model(what)
    sharded = run_on(world, model, PIECES, execution=replace(MODES[mode], sharded=True))
    for here, there in zip(history, sharded, strict=True):
        assert there == pytest.approx(here, rel=10 * CLOSE)
    whole = gather_weights(model, world.model(what))
    assert difference(plain.cpu().state_dict(), whole.state_dict()) < 100 * CLOSE


@needs_gpu
def test_the_device_trains_as_a_cpu_does(world: World) -> None:
    """A whole run in float32: its history, step by step, and its weights, to rounding."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = world.model("all")
        found.append((run_on(world, model, PIECES, device=device), model.cpu().state_dict()))
    for here, there in zip(found[0][0], found[1][0], strict=True):
        assert there == pytest.approx(here, rel=100 * CLOSE)
    assert difference(found[0][1], found[1][1]) < 1000 * CLOSE


if __name__ == "__main__":
    main(Path(os.environ["RESULTS"]))
