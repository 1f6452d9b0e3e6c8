"""Speed and memory of training with 1, 2 × 2 and 4 × 4 patches a token, the sides taking turns.

    python -m benchmarks.merging [--model minimind|smollm2] [--rounds 3] [--tiny]

CLIP B/16's shape at 256 pixels, whose 16 × 16 patches 4 divides (not so 14 × 14 at 224), and the language models' shapes of
benchmarks.engine, all with random weights. Every turn is a process of its own (benchmarks.sides). Prints samples a second with
their extremes; ratios are medians of the rounds'. Writes benchmarks/results/merging.json; `--tiny` writes nothing.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.engine import RESULTS, Model, rates_of, show
from benchmarks.figures import record
from benchmarks.turns import Bench
from benchmarks.world import LLAMAS, build, tokenise_rows
from pipeline.core.frame import exit_on_error

SIDE, PATCHES = 256, 256  # pixels, and 16 × 16 patches
FACTORS = (1, 2, 4)
BATCH = 8
ROWS = {("minimind", "pretrain"): 64, ("minimind", "sft"): 32, ("smollm2", "pretrain"): 16, ("smollm2", "sft"): 8}


def measure(bench: Bench, model: str, stage: str) -> dict[str, Any]:
    """Every factor's turns of a stage."""
    one = bench.turn("ours", stage=stage, model=model, rows=ROWS[model, stage], batch_size=BATCH, precision="bfloat16")
    sides = {f"{factor} × {factor}": _turn(one, factor) for factor in FACTORS}
    found = bench.take_turns(sides)
    show(bench, f"{stage}, {model}: {one.rows} rows", found)
    whole = found["1 × 1"]
    return {
        f"{stage}_{model}_samples_per_second": rates_of(found),
        f"{stage}_{model}_times_as_fast": {name: side.over(whole) for name, side in found.items()},
        f"{stage}_{model}_memory": {
            name: round(side.middle("peak_gb") / whole.middle("peak_gb"), 3) for name, side in found.items()
        },
    }


def _turn(one: Any, factor: int) -> Any:
    return one if factor == 1 else replace(one, factor=factor, table=_table(factor))


def _table(factor: int) -> str:
    return f"captions-{factor}"


def main(
    model: Annotated[Model | None, typer.Option(help="One language model's shape; default both.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 3,
    tiny: Annotated[bool, typer.Option(help="Two-layer models: does it work? No figures are kept.")] = False,
) -> None:
    """Time training by merging factor."""
    exit_on_error(lambda: _main([model.value] if model else list(LLAMAS), rounds, tiny=tiny))


def _main(models: list[str], rounds: int, *, tiny: bool) -> None:
    console = Console()
    console.width = max(console.width, 100)  # or figures would be cut off
    with tempfile.TemporaryDirectory() as folder:
        console.print("[dim]building models, pictures and rows[/dim]")
        most = max(ROWS.values())
        world = build(Path(folder), models=models, rows=most, pictures=most, tiny=tiny, side=SIDE)
        for factor in FACTORS[1:]:
            tokenise_rows(world, "captions", world.llm(models[0]), PATCHES // factor**2, name=_table(factor))
        bench = Bench(world, models, most, rounds, console)
        for name in models:
            for stage in ("pretrain", "sft"):
                figures = measure(bench, name, stage)
                if not tiny:
                    record(RESULTS / "merging.json", figures)


if __name__ == "__main__":
    typer.run(main)
