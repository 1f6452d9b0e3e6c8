"""Seconds of a row, measured: written, read from memory and from disk, and trained on by the loop that a stage runs."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.features import FeatureStore
from pipeline.vlm.training import Callbacks, TrainingRun, train

CPU_FLOPS = 2e11  # floating-point operations a second, about, by which a step's rows are chosen on a CPU
STEP = 2.0  # seconds that a step may take there, about
REPEATS = 5


class _EnoughError(Exception):
    """The run has told what was wanted of it."""


def time_reading(folder: Path, device: torch.device) -> tuple[float, float]:
    """Seconds of a row of a store, from memory and from disk, to float16 on the device; middle ones of several."""
    cold = []
    for _ in range(REPEATS):
        for shard in folder.glob("*.h5"):
            _forget(shard)
        store = FeatureStore(folder)  # a new one: rows are checked when they are first read, as in a run's first epoch
        cold.append(_seconds(lambda store=store: _read(store, device)) / len(store))  # type: ignore[misc]
    warm = [_seconds(lambda: _read(store, device)) / len(store) for _ in range(2 * REPEATS)]
    return sorted(warm[REPEATS:])[REPEATS // 2], sorted(cold)[REPEATS // 2]


def _forget(path: Path) -> None:
    """Have the system drop a file from memory, where it lets itself be asked."""
    with suppress(OSError, AttributeError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read(store: FeatureStore, device: torch.device) -> None:
    rows = np.random.default_rng(0).permutation(len(store))
    store.row_format.decode(torch.from_numpy(store.stored(rows)).to(device))
    wait_for(device)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(run: TrainingRun, *, seconds: float) -> float:
    """Seconds of training a row: the stage's own loop over the sample, after a warm-up of at least a step.

    Each of the two lasts one pass over the sample, or `seconds` and the step that is under way then.
    """
    rows = _rows_a_step(run)
    a_pass = len(run.examples.table) // rows
    stamps = [time.perf_counter()]
    warm: list[int] = []

    def on_step(_: dict[str, float]) -> None:
        wait_for(run.accelerator.device)
        stamps.append(time.perf_counter())
        since = warm[0] if warm else 0
        if len(stamps) - 1 - since >= a_pass or stamps[-1] - stamps[since] >= seconds:
            if warm:
                raise _EnoughError
            warm.append(len(stamps) - 1)

    schedule, execution = replace(run.schedule, batch_size=rows, epochs=3), replace(run.execution, name=f"timing {run.name}")
    with suppress(_EnoughError):
        train(run.model, run.examples, schedule, run.accelerator, execution=execution, callbacks=Callbacks(on_step=on_step))
    return (stamps[-1] - stamps[warm[0]]) / (rows * (len(stamps) - 1 - warm[0]))


def _rows_a_step(run: TrainingRun) -> int:
    """A power of two: as many as params ask for, fewer where a CPU would take long."""
    table, most = run.examples.table, run.training.batch_size
    if run.accelerator.device.type == "cpu":
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        most = min(most, max(8, int(CPU_FLOPS * STEP / (4 * parameters * float(table.lengths.mean())))))
    return 1 << (min(most, len(table)).bit_length() - 1)
