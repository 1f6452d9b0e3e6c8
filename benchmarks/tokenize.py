"""Tokenising beside the tokenizer library alone; and a million rows through `tokenize` and `check` in constant memory.

    python -m benchmarks.tokenize [--rows 1000000] [--only speed|memory|pictures] [--model FOLDER]

Both sides have the same text, the same cores and the same process, and take turns in random order. Prints tables and merges
figures into benchmarks/results/tokenize.json. What is inside each side is in benchmarks/README.md.
"""

import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.constant import follow_check, follow_tokenize
from benchmarks.figures import read, record
from benchmarks.talk import write_rows
from benchmarks.tokenizing import alone, hash_pictures, measure_speed, train_tokenizer
from pipeline.core.errors import USAGE, PipelineError
from pipeline.core.frame import exit_on_error

CHECKOUT = Path(__file__).resolve().parent.parent
WIDTH = 110  # columns of the tables, also where the output is no terminal
SPEED_ROWS = 20_000
SMALL = "600 tokens"

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    rows: Annotated[int, typer.Option(min=20_000, help="Rows whose memory is followed.")] = 1_000_000,
    only: Annotated[Literal["speed", "memory", "pictures"] | None, typer.Option(help="One part alone.")] = None,
    model: Annotated[str, typer.Option(help="Another model whose tokenizer is timed too.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns a side.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary files go, which are removed again.")] = None,
    out: Annotated[Path, typer.Option(help="Where tokenize.json goes.")] = CHECKOUT / "benchmarks/results",
) -> None:
    exit_on_error(lambda: _run([only] if only else ["speed", "pictures", "memory"], rows, model, rounds, folder, out))


def _run(parts: list[str], rows: int, model: str, rounds: int, folder: Path | None, out: Path) -> None:
    if sys.platform != "linux":
        raise PipelineError("needs Linux: memory and cores are those of /proc and the scheduler", code=USAGE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of the clean-up below
    read(out / "tokenize.json")  # before anything is measured, so that a run cannot end with nowhere to put its figures
    out.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="glance-tokenize-", dir=folder))
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "speed": partial(_speed, root / "speed", model, rounds),
        "pictures": partial(_pictures, root / "pictures", rounds),
        "memory": partial(_memory, root / "memory", rows),
    }
    try:
        for part in parts:
            record(out / "tokenize.json", measures[part]())
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _speed(root: Path, model: str, rounds: int) -> dict[str, Any]:
    write_rows(root, SPEED_ROWS, pictures=200)
    alone(1, train_tokenizer, root / "trained")
    models = {SMALL: "data/models/llm", "16,000 tokens": str(root / "trained")} | ({model: model} if model else {})
    cores = sorted({1, min(2, len(os.sched_getaffinity(0)))})
    figures: dict[str, Any] = {"rows_per_second": {}, "ours_over_library": {}, "ours_over_transformers": {}}
    for name, path in models.items():
        for count in cores:
            for file in ("rows.jsonl", "rows.parquet") if name == SMALL and count == cores[-1] else ("rows.jsonl",):
                title = f"{name}, {count} core{'s' * (count > 1)}, {file.rpartition('.')[2]}"
                rates, tokens = alone(count, measure_speed, root / file, path, count, rounds)
                ratios = {side: _ratio(rates["ours"], rates[side]) for side in ("library", "transformers")}
                _show(f"{title}: {tokens:.0f} tokens of text a row", rates)
                figures["rows_per_second"][title] = {side: _spread(values) for side, values in rates.items()}
                figures["ours_over_library"][title] = ratios["library"]
                figures["ours_over_transformers"][title] = ratios["transformers"]
    return figures


def _pictures(root: Path, rounds: int) -> dict[str, Any]:
    rates = alone(1, hash_pictures, root, rounds)
    _show("pictures hashed by one core, images/s", rates)
    return {"pictures_per_second": {name: _spread(values) for name, values in rates.items()}}


def _memory(root: Path, rows: int) -> dict[str, Any]:
    print(f"writing {rows:,} rows", flush=True)
    write_rows(root, rows, pictures=20_000)
    table = Table(title=f"Peak memory of the process in MB, {rows:,} rows", title_justify="left")
    for column in ("", "10 % of the rows", "50 %", "all", "bytes a row from 10 % on", "rows/s"):
        table.add_column(column, justify="right" if column else "left")
    figures: dict[str, Any] = {"memory_rows": rows}
    for name, follow in {"tokenize": partial(follow_tokenize, root), "check": partial(follow_check, root)}.items():
        peaks, rate = alone(len(os.sched_getaffinity(0)), follow, rows)
        grown = (peaks[-1] - peaks[0]) / (0.9 * rows)
        table.add_row(name, *(f"{peak / 1e6:,.0f}" for peak in peaks), f"{grown:.1f}", f"{rate:,.0f}")
        figures[f"{name}_peak_mb"] = [round(peak / 1e6, 1) for peak in peaks]
        figures[f"{name}_growth_bytes_a_row"] = round(grown, 2)
        figures[f"{name}_million_rows_per_second"] = round(rate)
    Console(width=WIDTH).print(table)
    return figures


def _ratio(these: list[float], those: list[float]) -> float:
    return round(statistics.median(one / other for one, other in zip(these, those, strict=True)), 3)


def _spread(values: list[float]) -> list[int]:
    return [round(of(values)) for of in (min, statistics.median, max)]


def _show(title: str, rates: dict[str, list[float]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "min a second", "median", "max", *(["ours ÷ it"] if "ours" in rates else [])):
        table.add_column(column, justify="right" if column else "left")
    for name, values in rates.items():
        ratio = [f"{_ratio(rates['ours'], values):.2f}"] if "ours" in rates else []
        table.add_row(name, *(f"{value:,}" for value in _spread(values)), *ratio)
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    app()
