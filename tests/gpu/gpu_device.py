"""Where the tests of this folder run, the GPU where there is one, else the CPU, and a training run there.

A test that means nothing on a CPU is marked `needs_gpu`. `make test-gpu` runs them all, marked or not.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import CPU, World
from test_loop import SCHEDULE

from pipeline.features.sources import StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.schedule import Execution, Schedule
from pipeline.vlm.model import packed_attention
from pipeline.vlm.model.ordered_attention import ORDERED
from pipeline.vlm.model.packed_attention import PACKED
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.loop import MIXED, train

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else CPU
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]

# As far as two orders of summing may be apart in float32, on this device. On a GPU it is an estimate: a mask that is wrong, or
# products in TF32, show as 1e-3 or more.
CLOSE, CLOSE_GRADIENT = (1e-5, 3e-4) if ON_GPU else (1e-6, 1e-5)

Test = TypeVar("Test", bound=Callable[..., None])


def needs_gpu(test: Test) -> Test:
    """The test is skipped on a machine without a GPU."""
    for mark in NEEDS_GPU:
        test = mark(test)
    return test


def forget_kernels() -> None:
    """Nothing has been compiled yet: torch counts all that one function is compiled for, and stops at eight."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    packed_attention._compiled.cache_clear()


@pytest.fixture(autouse=True)
def fresh_kernels() -> Iterator[None]:
    """In a module that imports this, a test begins without kernels, and fails where one would run on unfused for want of them."""
    forget_kernels()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    forget_kernels()


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Within, nothing has yet chosen a device or a number format for accelerate, which holds them for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()


@contextmanager
def accelerator_on(device: torch.device = DEVICE, precision: str = "float32", **options: Any) -> Iterator[Accelerator]:
    """accelerate on a device, in a precision as params name it."""
    with fresh_accelerate():
        yield Accelerator(mixed_precision=MIXED[precision], cpu=device.type == "cpu", **options)


def run_on(
    world: World,
    model: VisionLanguageModel,
    schedule: Schedule = SCHEDULE,
    *,
    table: TokenTable | None = None,
    device: torch.device = DEVICE,
    precision: str = "float32",
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    callbacks: Callbacks = Callbacks(),  # noqa: B008
    **options: Any,
) -> list[dict[str, float]]:
    """Train a model on a device, packed where `execution` says so; `options` are accelerate's. Returns the history."""
    table = table or world.table
    model.to(device)
    model.language_model.set_attn_implementation(PACKED if execution.packed else ORDERED)
    examples = Examples(table, StoredFeatures(world.store, table, device), world.builder.image_id)
    with accelerator_on(device, precision, **options) as accelerator:
        return train(model, examples, schedule, accelerator, execution=execution, callbacks=callbacks)
