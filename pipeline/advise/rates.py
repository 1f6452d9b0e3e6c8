"""Seconds of a row of a feature store, measured: read from memory and from disk."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.check import wait_for
from pipeline.features import FeatureStore

REPEATS = 5


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
