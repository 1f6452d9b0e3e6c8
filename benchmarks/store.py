"""Reads and writes of the feature store beside the machine's limits and other ways to keep the same rows, in one run.

    python -m benchmarks.store [--only warm|cold|writer] [--rows 2048] [--cold-rows 8192] [--int8]

Equal for all sides: rows, their order, batches, the state of the page cache. The sides take turns in random order and
every row that is read is compared once. Prints tables, merges figures into benchmarks/results/store.json and draws
store.svg beside it. A ratio is the median of the rounds' ratios, both sides of one round. What the figures are, and what
they should be, is in benchmarks/README.md.
"""

import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.bars import Bar, draw
from benchmarks.cold import in_child, measure_cold
from benchmarks.figures import record
from benchmarks.ours import DIRECT, OURS, OURS_INT8, RING
from benchmarks.peers import H5PY, PEERS
from benchmarks.rows import ROW_BYTES, Side
from benchmarks.warm import BATCHES, HEADLINE, MEMCPY, MEMCPY_ROWS, measure_warm
from benchmarks.writer import measure_writer
from pipeline.core.errors import ARTEFACT, RESOURCE, USAGE, PipelineError, brief
from pipeline.core.frame import exit_on_error

CHECKOUT = Path(__file__).resolve().parent.parent
WIDTH = 110  # columns of the tables, also where the output is no terminal
SPARE = 5e9  # bytes of disk left free
Rates = dict[str, list[float]]

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    only: Annotated[Literal["warm", "cold", "writer"] | None, typer.Option(help="One part alone.")] = None,
    rows: Annotated[int, typer.Option(min=max(BATCHES), help="Rows read warm: a multiple of 256.")] = 2048,
    cold_rows: Annotated[int, typer.Option(min=1024, help="Rows on disk for cold reads, of which an eighth is read.")] = 8192,
    images: Annotated[int, typer.Option(min=32, help="Pictures that are encoded.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Turns a side: twice as many for warm reads of the main batch size.")] = 10,
    int8: Annotated[bool, typer.Option("--int8", help="Also the store with vision.storage: int8.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the temporary files go, which are removed again.")] = CHECKOUT,
    out: Annotated[Path, typer.Option(help="Where store.json and store.svg go.")] = CHECKOUT / "benchmarks/results",
) -> None:
    parts: list[str] = [only] if only else ["cold", "warm", "writer"]  # cold first: it forks, which threads would not survive
    exit_on_error(lambda: _run(parts, rows // max(BATCHES) * max(BATCHES), cold_rows, images, rounds, int8, folder, out))


def _run(parts: Sequence[str], rows: int, cold_rows: int, images: int, rounds: int, int8: bool, folder: Path, out: Path) -> None:
    if sys.platform != "linux":
        raise PipelineError("needs Linux: what is in memory and what came from disk is read from /proc", code=USAGE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of the clean-up below
    _figures(out)
    sides = _installed([OURS, RING, DIRECT, *([OURS_INT8] if int8 else []), *PEERS])
    with _temporary(folder) as root:
        count = max(rows * ("warm" in parts), cold_rows * ("cold" in parts))
        if count:
            _write(sides, root, count)
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "cold": partial(_cold, sides, root, cold_rows, rounds),
            "warm": partial(_warm, [side for side in sides if not side.only_cold], root, rows, 2 * rounds),
            "writer": partial(_writer, root, images, rounds),
        }
        for part in parts:
            record(out / "store.json", measures[part]())
    _draw(out)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder below `folder` that is gone when the block ends, however it ends."""
    try:
        made = Path(tempfile.mkdtemp(prefix=".store-benchmark.", suffix=".tmp", dir=folder))  # git ignores .*.tmp
    except OSError as error:
        raise PipelineError(f"cannot be written: {error.strerror}", where=str(folder), remedy="--folder", code=RESOURCE) from None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _installed(sides: list[Side]) -> list[Side]:
    for side in sides:
        if not side.is_installed():
            print(f"{side.name}: skipped, {side.package} is not installed -> pip install {side.package}", flush=True)
    return [side for side in sides if side.is_installed()]


def _write(sides: Sequence[Side], root: Path, count: int) -> None:
    first = {side.folder(root): side for side in sides}
    need, free = sum(count * side.row_bytes for side in first.values()), shutil.disk_usage(root).free
    if need + SPARE > free:
        what = f"needs {(need + SPARE) / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free"
        raise PipelineError(what, where=str(root.parent), remedy="--folder on another disk, or fewer --cold-rows", code=RESOURCE)
    print(f"writing {count:,} rows of {ROW_BYTES:,} bytes in {len(first)} formats: {need / 1e9:.1f} GB", flush=True)
    for folder, side in first.items():
        folder.mkdir()
        in_child(partial(side.write, folder, count))


def _cold(sides: Sequence[Side], root: Path, count: int, rounds: int) -> dict[str, Any]:
    rates, amplification = measure_cold(sides, root, count, rounds)
    fetched = {name: statistics.median(values) for name, values in amplification.items()}
    _show(f"cold: random rows of {count * ROW_BYTES / 1e9:.1f} GB, page cache dropped", rates, fetched)
    return {
        "cold_read_over_odirect": _ratio(rates[OURS.name], rates[DIRECT.name]),
        "cold_ring_read_over_odirect": _ratio(rates[RING.name], rates[DIRECT.name]),
        "cold_read_amplification": round(fetched[OURS.name], 3),
        "best_peer_over_ours_cold": _best_peer(rates),
        "cold_gb_per_second": _spread(rates),
        "cold_amplification": {name: round(value, 2) for name, value in fetched.items()},
        "cold_rows": count,
    }


def _warm(sides: Sequence[Side], root: Path, count: int, rounds: int) -> dict[str, Any]:
    found = measure_warm(sides, root, count, rounds)
    for batch, rates in found.items():
        _show(f"warm: {count:,} rows in memory, batches of {batch} random rows", rates)
    rates = found[HEADLINE]
    limit = max(rates[MEMCPY], rates[MEMCPY_ROWS], key=statistics.median)
    return {
        "warm_read_over_memcpy": _ratio(rates[OURS.name], limit),
        "warm_read_over_h5py": _ratio(rates[OURS.name], rates[H5PY.name]),
        "ring_read_over_memcpy": _ratio(rates[RING.name], limit),
        "best_peer_over_ours_warm": _best_peer(rates),
        "warm_gb_per_second": {str(batch): _spread(rates) for batch, rates in found.items()},
        "warm_rows": count,
    }


def _writer(root: Path, images: int, rounds: int) -> dict[str, Any]:
    found = measure_writer(root, images, rounds)
    table = Table(title=f"writer: {images} pictures through CLIP ViT-B/16's shape", title_justify="left")
    for column in ("seconds", "min", "median", "max"):
        table.add_column(column, justify="left" if column == "seconds" else "right")
    sides = {"extract": found.extract, "decode and encode, nothing written": found.bare, "its encoder alone": found.encoder}
    for name, seconds in sides.items():
        table.add_row(name, *(f"{value:.2f}" for value in (min(seconds), statistics.median(seconds), max(seconds))))
    for name, shares in {"storing ÷ encoder": found.overhead(), "waiting for pictures ÷ extract": found.waiting()}.items():
        table.add_row(name, *(f"{value:.1%}" for value in (min(shares), statistics.median(shares), max(shares))))
    Console(width=WIDTH).print(table)
    return {
        "writer_overhead": round(statistics.median(found.overhead()), 4),
        "writer_waiting_for_decode": round(statistics.median(found.waiting()), 4),
        "writer_once_seconds": round(found.once, 3),
        "writer_seconds": {name: [round(value, 3) for value in seconds] for name, seconds in sides.items()},
    }


def _ratio(these: list[float], those: list[float]) -> float:
    return round(statistics.median(one / other for one, other in zip(these, those, strict=True)), 3)


def _best_peer(rates: Rates) -> float:
    return max(_ratio(rates[side.name], rates[OURS.name]) for side in PEERS if side.name in rates)


def _spread(rates: Rates) -> dict[str, list[float]]:
    """Smallest, median and largest of the rounds, in GB/s of float16 features."""
    return {name: [round(of(values) / 1e9, 3) for of in (min, statistics.median, max)] for name, values in rates.items()}


def _show(title: str, rates: Rates, fetched: dict[str, float] | None = None) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("reader", "min GB/s", "median", "max", "rows/s", "ours ÷ it", *(["disk bytes ÷ wanted"] if fetched else [])):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, spread in _spread(rates).items():
        cells = [f"{spread[1] * 1e9 / ROW_BYTES:,.0f}", f"{_ratio(rates[OURS.name], rates[name]):.2f}"]
        table.add_row(Text(name), *(f"{value:.2f}" for value in spread), *cells, *([f"{fetched[name]:.2f}"] if fetched else []))
    Console(width=WIDTH).print(table)


def _figures(out: Path) -> dict[str, Any]:
    """What store.json holds; read before anything is measured, so that a run cannot end with nowhere to put its figures."""
    path = out / "store.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        return dict(json.loads(path.read_text(encoding="utf-8"))["figures"]) if path.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"not a file of benchmark figures: {brief(error)}"
        raise PipelineError(what, where=str(path), remedy="delete it, or another --out", code=ARTEFACT) from None


def _draw(out: Path) -> None:
    """Bars of what store.json now holds, of this run or an earlier one."""
    figures = _figures(out)
    groups = {
        f"In memory, batches of {HEADLINE}, in thousands": figures.get("warm_gb_per_second", {}).get(str(HEADLINE), {}),
        "From disk, page cache dropped, in thousands": figures.get("cold_gb_per_second", {}),
    }
    bars = [
        Bar(title, name, *(spread[i] * 1e6 / ROW_BYTES for i in (1, 0, 2)))
        for title, rates in groups.items()
        for name, spread in sorted(rates.items(), key=lambda item: -item[1][1])
    ]
    if bars:
        draw(out / "store.svg", bars)


if __name__ == "__main__":
    app()
