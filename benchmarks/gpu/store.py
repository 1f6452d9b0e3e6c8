"""From the feature store to the card, as training has it: the source, read ahead, copied over, decoded where it is int8."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.cold import IN_MEMORY, drop_cache, share_in_memory
from benchmarks.gpu.clock import spread, wait_for
from benchmarks.gpu.runner import Figures, Setting, guarded
from benchmarks.gpu.world import threads
from benchmarks.ours import loaded_ahead, store, store_int8
from pipeline.core.errors import RESOURCE, PipelineError
from pipeline.features.sources import StoredFeatures
from pipeline.features.store.store import FeatureStore
from pipeline.text.token_table import TokenTable

ROWS, TINY_ROWS = 8192, 96  # of CLIP ViT-B/16: 2.5 GB in float16
BATCH, TINY_BATCH = 64, 16
ROUNDS = 5


def measure(setting: Setting) -> Iterator[Figures]:
    """GB/s of stored bytes that arrive on the device, rows in random order: warm, then cold where caches can be dropped."""
    count = TINY_ROWS if setting.tiny else ROWS
    for name, write in {"float16": store, "int8": store_int8}.items():
        folder = setting.folder / f"store-{name}"
        folder.mkdir(exist_ok=True)
        write(folder, count)
        yield {name: guarded("warm", partial(_warm, folder, setting))}
        yield {name: guarded("cold", partial(_cold, folder, setting))}


def _open(folder: Path, device: torch.device) -> tuple[StoredFeatures, int, int]:
    """The source that training would have, its rows, and the bytes of one."""
    held = FeatureStore(folder)
    row = held.row_format.dtype.itemsize * int(np.prod(held.row_format.shape))
    return StoredFeatures(held, TokenTable(folder / "tokens.arrow"), device), len(held), row


def _epoch(source: StoredFeatures, count: int, setting: Setting, shuffled: Callable[[int], np.ndarray]) -> float:
    """Seconds from the first batch that is asked for until the last is on the device."""
    batch = TINY_BATCH if setting.tiny else BATCH
    batches = list(shuffled(count).reshape(-1, batch))
    began = time.perf_counter()
    for loaded in loaded_ahead(source, batches, threads()):
        source.features(loaded)
    wait_for(setting.device)
    return time.perf_counter() - began


def _warm(folder: Path, setting: Setting) -> Figures:
    """A first round, which brings rows into memory and checks each, does not count."""
    (source, rows, size), rng = _open(folder, setting.device), np.random.default_rng(0)
    found = [_epoch(source, rows, setting, rng.permutation) for _ in range(ROUNDS + 1)][1:]
    return {
        "gb_per_second": spread((rows * size / spent / 1e9 for spent in found), 2),
        "rows_per_second": spread(rows / spent for spent in found),
    }


def _cold(folder: Path, setting: Setting) -> Figures:
    """One round with a new source; raises `PipelineError` where the rows stay in memory all the same."""
    drop_cache(folder)
    if share_in_memory(folder) > IN_MEMORY:
        raise PipelineError("cold: the page cache could not be dropped", code=RESOURCE)
    source, rows, size = _open(folder, setting.device)
    spent = _epoch(source, rows, setting, np.random.default_rng(1).permutation)
    return {"gb_per_second": round(rows * size / spent / 1e9, 2), "rows_per_second": round(rows / spent)}
