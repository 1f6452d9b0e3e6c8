"""The training engine beside a naive trainer, on the same rows and models, the sides taking turns.

    python -m benchmarks.engine [--only pretrain|sft|extract|shared|linear] [--rows 96] [--rounds 3] [--tiny]

Every turn of a side is a process of its own (benchmarks.sides); in each round every side has one turn and another one
goes first. Before anything is timed, one batch goes through both sides in float32: losses and gradients must agree.
Prints the rates with their extremes; a ratio is the median of the rounds' ratios. Writes benchmarks/results/engine.json
and engine.svg; `--tiny` writes neither.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, draw
from benchmarks.figures import record
from benchmarks.naive import RECIPES
from benchmarks.turns import Bench, Found
from benchmarks.world import LLAMAS, QUESTIONS, build
from pipeline.core.frame import exit_on_error

TUNED = 288  # the padded length that a user who has measured these rows would set
EPOCHS = 4  # of MiniMind-V's pretraining: what one extraction serves
CLOSE, FAR = 1e-4, 3e-4  # relative differences allowed in a loss and in a gradient: patches shifted by one give more
SHARED_BATCH = 4 * QUESTIONS  # four pictures a step: MiniMind-V's batches would cut a picture's questions apart
RESULTS = Path("benchmarks/results")
BATCHES = {("pretrain", "smollm2"): 4}  # of MiniMind-V's 16 rows, padded to 640, the naive side needs more than 24 GB here
SHARES = {"minimind": {"pretrain": 1, "sft": 3}, "smollm2": {"pretrain": 3, "sft": 6}}  # slow sides get 1/n of the rows


class Part(StrEnum):
    PRETRAIN = "pretrain"
    SFT = "sft"
    EXTRACT = "extract"
    SHARED = "shared"
    LINEAR = "linear"


class Model(StrEnum):
    MINIMIND = "minimind"
    SMOLLM2 = "smollm2"


def show(bench: Bench, title: str, found: dict[str, Found]) -> None:
    """One table: a row a side, ratios against the first."""
    table = Table(title=title, box=box.SIMPLE)
    for column in ("side", "samples/s", "min–max", "first ÷", "padding", "GB", "loss"):
        table.add_column(column, no_wrap=True)
    first = next(iter(found.values()))
    for name, side in found.items():
        rates = side.rates()
        told = [
            f"{side.turns[0][key]:{form}}" if key in side.turns[0] else "" for key, form in (("padding", ".1%"), ("loss", ".4f"))
        ]
        speeds = [f"{side.rate():.2f}", f"{min(rates):.2f}–{max(rates):.2f}", f"{first.over(side):.2f}"]
        table.add_row(name, *speeds, told[0], f"{side.middle('peak_gb'):.2f}", told[1])
    bench.console.print(table)


def rates_of(found: dict[str, Found]) -> dict[str, dict[str, float]]:
    """What the JSON file keeps of every side."""
    kept: dict[str, dict[str, float]] = {}
    for name, side in found.items():
        rates = side.rates()
        kept[name] = {"min": round(min(rates), 3), "median": round(side.rate(), 3), "max": round(max(rates), 3)}
        kept[name] |= {key: round(side.middle(key), 4) for key in ("padding", "peak_gb") if key in side.turns[0]}
    return kept


def stage(bench: Bench, name: str, model: str) -> dict[str, Any]:
    """A training stage: ours beside the naive trainer as it comes, tuned by hand, and tuned in bfloat16."""
    suffix = "" if model == "minimind" else f"_{model}"
    batch = BATCHES.get((name, model), RECIPES[name].batch_size)
    rows = max(2 * batch, bench.rows // SHARES[model][name] // batch * batch)
    figures: dict[str, Any] = same_work(bench, name, model, batch_size=batch)
    naive = bench.turn("naive", stage=name, model=model, rows=rows, batch_size=batch)
    ours = replace(naive, side="ours", precision="bfloat16")
    found = bench.take_turns(
        {
            "ours, bfloat16": ours,
            "ours, bfloat16, compiled": replace(ours, compiled=True),
            "ours, float32": replace(ours, precision="float32"),
            f"naive, {RECIPES[name].length}": naive,
            f"naive, {TUNED}": replace(naive, length=TUNED),
            f"naive, {TUNED}, bfloat16": replace(naive, length=TUNED, precision="bfloat16"),
        }
    )
    show(bench, f"{name}, {model}: {rows} rows", found)
    limit = bench.run(bench.turn("matrix_rate", rows=rows))["flops_per_second"]
    best, compiled, exact, default, tuned, half = found.values()
    figures |= {
        "over_default": best.over(default),
        "over_tuned": best.over(tuned),
        "compiled_over_default": compiled.over(default),
        "compiled_over_tuned": compiled.over(tuned),
        "float32_over_tuned": exact.over(tuned),
        "over_tuned_bfloat16": best.over(half),
        "share_of_bf16_rate": round(best.rate() * figures["gflop_per_sample"] * 1e9 / limit, 3),
        "memory_over_naive": round(best.middle("peak_gb") / default.middle("peak_gb"), 3),
        "samples_per_second": rates_of(found),
    }
    if name == "pretrain":  # what one extraction costs, spread over the epochs that it serves
        seconds = 1 / best.rate() + 1 / bench.world.facts()["extract_images_per_second"] / EPOCHS
        figures["with_extraction_over_default"] = round(1 / seconds / default.rate(), 3)
    return {f"{name}_{key}{suffix}": value for key, value in figures.items()}


def same_work(bench: Bench, name: str, model: str, **settings: Any) -> dict[str, float]:
    """Raises AssertionError unless both sides compute the same loss and gradient from one batch."""
    rows = settings.get("batch_size") or RECIPES[name].batch_size
    told = bench.run(bench.turn("same_work", stage=name, model=model, rows=rows, **settings))
    away = abs(told["ours"] / told["naive"] - 1)
    bench.console.print(
        f"{name}, {model}, one batch in float32: loss {told['ours']:.6f}, naive {told['naive']:.6f}, {away:.1e} apart; "
        f"gradients {told['gradient_distance']:.1e} apart",
        highlight=False,
    )
    if away > CLOSE or told["gradient_distance"] > FAR:
        raise AssertionError(f"the sides do not do the same work: {told}")
    return {
        "loss_distance": float(f"{away:.2e}"),
        "gradient_distance": float(f"{told['gradient_distance']:.2e}"),
        "gflop_per_sample": round(told["flops_per_sample"] / 1e9, 3),
    }


def extraction(bench: Bench) -> dict[str, Any]:
    """Images to features, decoding included, and what share of the machine's bfloat16 rate that is."""
    rows = max(32, bench.rows)
    ours = bench.turn("extract_ours", rows=rows, precision="bfloat16")
    sides = {
        "ours, bfloat16": ours,
        "ours, float32": replace(ours, precision="float32"),
        "Transformers, float32": bench.turn("extract_naive", rows=rows),
        "matrix rate": bench.turn("matrix_rate", rows=rows),
    }
    found = bench.take_turns(sides)
    best = found["ours, bfloat16"]
    limit = found.pop("matrix rate").middle("flops_per_second")
    show(bench, f"extract: {rows} pictures", found)
    flops = best.turns[0]["flops"]
    figures = {
        "extract_over_fp32_loop": best.over(found["Transformers, float32"]),
        "extract_share_of_bf16_rate": round(best.rate() * flops / limit, 3),
        "encode_share_of_bf16_rate": round(best.middle("encode_per_second") * flops / limit, 3),
        "bf16_gflops": round(limit / 1e9, 1),
        "fp32_loop_gflops": round(found["Transformers, float32"].rate() * flops / 1e9, 1),
        "gflop_per_image": round(flops / 1e9, 3),
        "extract_images_per_second": rates_of(found),
    }
    bench.console.print({key: value for key, value in figures.items() if not isinstance(value, dict)})
    return figures


def shared(bench: Bench) -> dict[str, Any]:
    """Ten questions on each picture: image sharing off and on, beside the naive trainer, in both stages."""
    figures: dict[str, Any] = {}
    for name in ("pretrain", "sft"):
        same_work(bench, name, bench.models[0], table="questions", share_images=True)
        rows = max(SHARED_BATCH, bench.rows // SHARES["minimind"][name] // SHARED_BATCH * SHARED_BATCH)
        naive = bench.turn("naive", stage=name, model=bench.models[0], table="questions", rows=rows)
        off = replace(naive, side="ours", precision="bfloat16", batch_size=SHARED_BATCH)
        found = bench.take_turns(
            {
                "ours, shared": replace(off, share_images=True),
                "ours, not shared": off,
                f"naive, {RECIPES[name].length}": naive,
            }
        )
        show(bench, f"{name}, {QUESTIONS} questions a picture, {bench.models[0]}: {rows} rows", found)
        on, separate, default = found.values()
        figures |= {
            f"shared_{name}_speedup": on.over(separate),
            f"shared_{name}_over_default": on.over(default),
            f"shared_{name}_fewer_tokens": round(separate.middle("tokens") / on.middle("tokens"), 3),
            f"shared_{name}_samples_per_second": rates_of(found),
        }
    return figures | {"shared_image_speedup": figures["shared_pretrain_speedup"]}


def linear(bench: Bench) -> dict[str, Any]:
    """Time for 1, 4 and 16 times the rows: 1 is a cost that grows as the rows do."""
    times = (1, 4, 16)
    base = linear_base(bench.rows)
    one = bench.turn("ours", precision="bfloat16")
    found = bench.take_turns({f"{count} × {base} rows": replace(one, rows=count * base) for count in times})
    show(bench, "cost", found)
    seconds = [side.middle("seconds") for side in found.values()]
    slope = np.polyfit(np.log(times), np.log(seconds), 1)[0]
    memory = [round(side.middle("peak_gb"), 3) for side in found.values()]
    return {
        "cost_exponent": round(float(slope), 3),
        "cost_rows": [count * base for count in times],
        "cost_seconds": [round(value, 3) for value in seconds],
        "cost_peak_gb": memory,
    }


def linear_base(rows: int) -> int:
    """Rows of the shortest turn: enough that starting and ending it are little of its time."""
    return max(48, rows // 2)


def measure(part: Part, bench: Bench) -> Iterator[dict[str, Any]]:
    """A part's figures, as soon as there are some: a later side may need more memory than there is."""
    if part in (Part.PRETRAIN, Part.SFT):
        for model in bench.models:
            yield stage(bench, part.value, model)
    else:
        yield {Part.EXTRACT: extraction, Part.SHARED: shared, Part.LINEAR: linear}[part](bench)


def picture(figures: dict[str, Any]) -> list[Bar]:
    """A bar a side and part, from what the JSON file holds."""
    named = {"extract": "extract_images_per_second"}
    for name in ("pretrain", "sft"):
        named[f"{name}, {QUESTIONS} questions a picture"] = f"shared_{name}_samples_per_second"
        named |= {f"{name}, {model}": f"{name}_samples_per_second{'' if model == 'minimind' else f'_{model}'}" for model in LLAMAS}
    return [
        Bar(title, side, values["median"], values["min"], values["max"])
        for title, key in named.items()
        for side, values in figures.get(key, {}).items()
    ]


def main(
    only: Annotated[Part | None, typer.Option(help="One part of the benchmark.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a turn; slow sides get a share of them.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 3,
    model: Annotated[Model | None, typer.Option(help="One language model's shape; default both.")] = None,
    tiny: Annotated[bool, typer.Option(help="Two-layer models: does it work? No figures are kept.")] = False,
) -> None:
    """Time the training engine beside a naive trainer."""
    models = [model.value] if model else list(LLAMAS)
    exit_on_error(lambda: _main([only] if only else list(Part), rows, rounds, models, tiny=tiny))


def _main(parts: list[Part], rows: int, rounds: int, models: list[str], *, tiny: bool) -> None:
    console = Console()
    console.width = max(console.width, 100)  # or figures would be cut off
    with tempfile.TemporaryDirectory() as folder:
        console.print("[dim]building models, pictures and rows[/dim]")
        world = build(Path(folder), models=models, rows=max(32, 16 * linear_base(rows)), pictures=max(32, rows), tiny=tiny)
        bench = Bench(world, models, rows, rounds, console)
        for figures in chain.from_iterable(measure(part, bench) for part in parts):
            if tiny:
                continue
            record(RESULTS / "engine.json", figures)
            draw(RESULTS / "engine.svg", picture(json.loads((RESULTS / "engine.json").read_text(encoding="utf-8"))["figures"]))


if __name__ == "__main__":
    typer.run(main)
