"""A training step on a GPU: the host waits for the card once, at its end, and memory follows from the token budget alone."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, World
from gpu_device import DEVICE, accelerator_on, fresh_kernels, needs_gpu, run_on  # noqa: F401
from test_loop import SCHEDULE

from pipeline.features.sources import StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.loader import BatchLoader
from pipeline.vlm.batches.schedule import Execution, Schedule
from pipeline.vlm.model.ordered_attention import ORDERED
from pipeline.vlm.model.packed_attention import PACKED
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.loop import _Steps

PIECES = replace(SCHEDULE, epochs=3, micro_tokens=256)


@contextmanager
def waits() -> Iterator[list[str]]:
    """The places, as calls from outside in, at which the host waits for the card within.

    torch tells of each by a warning (`set_sync_debug_mode`); as an error it would tell of the first one only.
    """
    found: list[str] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            calls = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_stack()[:-1]]
            found.append(" > ".join(calls[-5:]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_of_a_run(world: World, execution: Execution, precision: str) -> tuple[list[str], list[list[str]]]:
    """Where the host waits in a run's steps after its first epoch: before a step's update, and within each update."""
    model, source = world.model("all").to(DEVICE), StoredFeatures(world.store, world.table, DEVICE)
    model.language_model.set_attn_implementation(PACKED if execution.packed else ORDERED)
    examples, at_end = Examples(world.table, source, world.builder.image_id), []
    with accelerator_on(DEVICE, precision) as accelerator:
        loader = BatchLoader(examples, PIECES, execution)
        steps = _Steps(model, PIECES, accelerator, loader.steps, Callbacks(), sharded=False)
        for epoch in range(PIECES.epochs):
            steps.begin()
            with waits() as places:
                for (micro, batch), features in source.stream(loader.load(epoch, len(steps.history), accelerator)):
                    steps.backward(micro, batch, features)
                    if micro.last:
                        before = len(places)
                        steps.update(epoch, "")
                        at_end.append(places[before:])
                        del places[before:]
                        steps.begin()
            if epoch == 0:  # kernels are compiled and caches filled
                at_end.clear()
        steps.unwrap()
    return places, at_end


@needs_gpu
def test_waiting_for_the_card_is_noticed_and_its_place_is_told() -> None:
    """Or the tests below could not fail."""
    with waits() as places:
        float(torch.ones(1, device=DEVICE).sum())
    assert len(places) == 1
    assert "test_waiting_for_the_card" in places[0]


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_does_not_wait_for_the_card_before_a_steps_end(world: World, packed: bool, precision: str) -> None:
    """Tensors are sent and passes are queued without a question to the card."""
    places, _ = waits_of_a_run(world, Execution(packed=packed), precision)
    assert places == []


@needs_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_step_ends_with_one_read(world: World, precision: str) -> None:
    _, at_end = waits_of_a_run(world, Execution(packed=True), precision)
    assert max(map(len, at_end)) <= 1, at_end


@pytest.fixture(scope="module")
def many(world: World) -> TokenTable:
    """Rows for one large step."""
    return world.tokens(ROWS * 24, "many")


def peak(world: World, table: TokenTable, schedule: Schedule, execution: Execution) -> int:
    """Most bytes of the card that a run has held at once."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    run_on(world, world.model("all"), schedule, table=table, execution=execution)
    return torch.cuda.max_memory_allocated(DEVICE) - before


@needs_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_memory_follows_from_the_token_budget_not_from_the_rows_of_a_step(world: World, many: TokenTable, packed: bool) -> None:
    """Steps of 32 and of 256 rows under one budget hold as much; under a budget eight times as large they hold more."""
    execution = Execution(packed=packed)
    small, large = (replace(SCHEDULE, epochs=1, batch_size=rows, micro_tokens=1024) for rows in (32, 256))
    peak(world, many, small, execution)  # kernels are compiled and libraries have their workspaces
    held = [peak(world, many, schedule, execution) for schedule in (small, large, replace(large, micro_tokens=8192))]
    assert held[1] < 1.1 * held[0]
    assert held[2] > 2 * held[1], "or the budget would bound nothing here"


@needs_gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_is_flat_over_200_steps(world: World, precision: str, packed: bool) -> None:
    """Steps of all rows, so that all are alike: what is held after each, and what is held at most, do not grow."""
    held: list[tuple[int, int]] = []

    def note(_: dict[str, float]) -> None:
        held.append((torch.cuda.memory_allocated(DEVICE), torch.cuda.max_memory_allocated(DEVICE)))

    schedule = replace(SCHEDULE, epochs=200, batch_size=len(ROWS))
    options = {"precision": precision, "execution": Execution(packed=packed)}
    history = run_on(world, world.model("all"), schedule, callbacks=Callbacks(on_step=note), **options)
    assert len(history) == len(held) == 200
    after, most = zip(*held, strict=True)
    assert max(after[100:]) <= 1.01 * max(after[5:100])
    assert most[-1] <= 1.01 * most[20]
