"""Warm random-row reads from the feature store, beside memcpy and other ways to keep the same rows, in one run.

    python -m benchmarks.store [--rows 1024]

Writes rows [N, 196, 768] float16 (CLIP ViT-B/16: 301,056 bytes each) in every format, then fills one reused buffer with
batches of rows picked at random, the formats taking turns. Equal for all sides: rows, order, batch, buffer, page cache
warm. Prints min / median / max of the rounds and writes benchmarks/results/store.json.
"""

import io
import os
import platform
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.files import write_json
from pipeline.shards import Shard, write_shard

SHAPE, BATCH, ROUNDS = (196, 768), 64, 30
Read = Callable[[np.ndarray, np.ndarray], None]


def ours(folder: Path, data: np.ndarray) -> Read:
    spec = {"tokens": SHAPE[0], "width": SHAPE[1]}
    hashes = np.random.default_rng(1).integers(0, 256, (len(data), 32), np.uint8)
    write_shard(folder / "shard.h5", hashes, spec, np.array_split(data, 16))
    return Shard(folder / "shard.h5").read


def plain_h5py(folder: Path, data: np.ndarray) -> Read:
    with h5py.File(folder / "plain.h5", "w") as file:
        file.create_dataset("features", data=data)
    dataset = h5py.File(folder / "plain.h5", "r")["features"]

    def read(rows: np.ndarray, out: np.ndarray) -> None:
        for i, row in enumerate(rows):
            out[i] = dataset[row]

    return read


def npy_memmap(folder: Path, data: np.ndarray) -> Read:
    np.save(folder / "rows.npy", data)
    array = np.load(folder / "rows.npy", mmap_mode="r")
    return lambda rows, out: np.take(array, rows, 0, out=out, mode="clip")


def safetensors_slices(folder: Path, data: np.ndarray) -> Read:
    save_file({"features": data}, folder / "rows.safetensors")
    held = safe_open(folder / "rows.safetensors", "np")
    rows_of = held.get_slice("features")

    def read(rows: np.ndarray, out: np.ndarray) -> None:
        for i, row in enumerate(rows):
            out[i] = rows_of[int(row)]

    return read


def tar_of_arrays(folder: Path, data: np.ndarray) -> Read:
    """A tar of .npy members with their offsets remembered, so that a row is one read."""
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, row in enumerate(data):
            content = io.BytesIO()
            np.save(content, row)
            member = tarfile.TarInfo(f"{number:08d}.npy")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    with tarfile.open(folder / "rows.tar") as tar:
        offsets = [member.offset_data + member.size - data[0].nbytes for member in tar]
    handle = os.open(folder / "rows.tar", os.O_RDONLY)

    def read(rows: np.ndarray, out: np.ndarray) -> None:
        for i, row in enumerate(rows):
            os.preadv(handle, [out[i]], offsets[row])

    return read


def memcpy(data: np.ndarray) -> Read:
    """The limit: batches that already lie together in memory, copied to the reused buffer."""
    return lambda rows, out: np.copyto(out, data[rows[0] // BATCH * BATCH :][: len(rows)])


def measure(readers: dict[str, Read], data: np.ndarray) -> dict[str, list[float]]:
    """Bytes a second of each reader in each round, the readers taking turns; every row is compared once."""
    out = np.empty((BATCH, *SHAPE), np.float16)
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(ROUNDS + 1):
        batches = rng.permutation(len(data)).reshape(-1, BATCH)
        order = list(readers.items())
        for name, read in order[turn % len(order) :] + order[: turn % len(order)]:  # none is always first
            began = time.perf_counter()
            for rows in batches:
                read(rows, out)
            spent = time.perf_counter() - began
            if turn:
                found[name].append(data.nbytes / spent)
                continue
            for rows in batches if name != "memcpy" else ():  # the first turn warms up and checks
                read(rows, out)
                if not np.array_equal(out.view(np.uint16), data[rows].view(np.uint16)):
                    raise AssertionError(f"{name} gives other rows")
    return found


def main(rows: Annotated[int, typer.Option(min=BATCH, help="Rows, a multiple of 64.")] = 1024) -> None:
    data = np.random.default_rng(0).normal(size=(rows // BATCH * BATCH, *SHAPE)).astype(np.float16)
    with tempfile.TemporaryDirectory() as name:
        formats = (ours, plain_h5py, npy_memmap, safetensors_slices, tar_of_arrays)
        readers = {"memcpy": memcpy(data)} | {make.__name__.replace("_", " "): make(Path(name), data) for make in formats}
        found = measure(readers, data)
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    table = Table("reader", "min GB/s", "median", "max", "ours ÷ it")
    for name, rates in found.items():
        gb = [f"{value / 1e9:.2f}" for value in (min(rates), middle[name], max(rates))]
        table.add_row(name, *gb, f"{middle['ours'] / middle[name]:.2f}")
    Console().print(table)
    peers = [rate for name, rate in middle.items() if name not in ("ours", "memcpy")]
    figures = {
        "warm_read_over_memcpy": round(middle["ours"] / middle["memcpy"], 3),
        "warm_read_over_h5py": round(middle["ours"] / middle["plain h5py"], 3),
        "best_peer_over_ours_warm": round(max(peers) / middle["ours"], 3),
        "median_gb_per_second": {name: round(rate / 1e9, 3) for name, rate in middle.items()},
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "system": platform.system()}
    content = {"hardware": hardware, "commit": commit, "rows": len(data), "batch": BATCH, "figures": figures}
    write_json(Path("benchmarks/results/store.json"), content)


if __name__ == "__main__":
    typer.run(main)
