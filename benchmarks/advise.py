"""The table of docs/features.md: what `glance advise` says for the demo and for real shapes with random weights, on this machine.

    python -m benchmarks.advise [--out FOLDER] [--tiny]

Rates are measured; run times are those of as many pictures as the table says, a caption each, none of them held in
`runtime.live_cache_mb`. About three minutes on two cores. `--tiny` runs two-layer models and writes nothing.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.figures import hardware, read, record
from benchmarks.world import IMAGE_TOKEN, World, build
from pipeline.advise import Advice, advise
from pipeline.advise.verdict import choose
from pipeline.check import seconds_text, size_text
from pipeline.core.files import publish
from pipeline.core.frame import exit_on_error
from pipeline.params import Params, check, override, read_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE, BEGIN, END = ROOT / "docs/features.md", "<!-- python -m benchmarks.advise -->\n", "<!-- end -->\n"
PICTURES = 100_000
PAIRS = {"CLIP B/16, 26 M": "minimind", "CLIP B/16, SmolLM2-135M": "smollm2"}
HEAD = """| encoder, language model | decode | encode | a step, a row | disk | extract | an epoch stored | live | ahead from |
|---|---|---|---|---|---|---|---|---|
"""


def projects(folder: Path, *, tiny: bool) -> Iterator[tuple[str, Params]]:
    """Each pair with a project's params."""
    content = read_yaml(ROOT / "params.yaml")
    yield "the demo's own", check(content, where="params.yaml")
    world = build(folder / "world", models=list(PAIRS.values()), rows=64, pictures=64, tiny=tiny)
    for name, model in PAIRS.items():
        yield name, check(_content(world, model), where=name)


def _content(world: World, model: str) -> dict[str, Any]:
    content = read_yaml(ROOT / "params.yaml")
    override(content, [f"vision.model={world.clip}", f"llm.model={world.llm(model)}", f"llm.image_token='{IMAGE_TOKEN}'"])
    for part in content["data"].values():
        if isinstance(part, dict):
            part |= {"records": str(world.records("captions")), "images": str(world.images)}
    return content


def facts(advice: Advice) -> dict[str, Any]:
    """What was measured, in milliseconds, and what follows for each stage."""
    rates, stages = advice.rates, {}
    for work in advice.work:
        many = replace(work, rows=PICTURES, pictures=PICTURES, fresh=PICTURES, visits=PICTURES, kept=0, epochs=1)
        choice = choose(rates, many, in_memory=PICTURES * advice.shape.row < advice.memory)
        stages[work.name] = {"step_ms": 1000 * work.step, "extract": choice.extract, "stored": choice.stored, "live": choice.live}
        stages[work.name]["ahead_from"] = choice.ahead_from
    each = {"decode": rates.picture.decoding, "encode": rates.picture.encoding, "write": rates.writing}
    each |= {"from_memory": rates.from_memory, "from_disk": rates.from_disk}
    return {**{f"{name}_ms": 1000 * seconds for name, seconds in each.items()}, "row_bytes": advice.shape.row, **stages}


def rows_of(name: str, found: dict[str, Any]) -> Iterator[str]:
    """A line of the table a stage."""
    for stage in ("pretrain", "sft"):
        told = found[stage]
        ahead = f"{told['ahead_from']} epoch{'s' * (told['ahead_from'] != 1)}" if told["ahead_from"] else "never"
        yield (
            f"| {name}, {stage} | {found['decode_ms']:.3g} ms | {found['encode_ms']:.3g} ms | {told['step_ms']:.3g} ms | "
            f"{size_text(PICTURES * found['row_bytes'])} | {seconds_text(told['extract'])} | {seconds_text(told['stored'])} | "
            f"{seconds_text(told['live'])} ({told['live'] / told['stored']:.2f} ×) | {ahead} |\n"
        )


def write_page(page: Path, table: str) -> None:
    """Put the table where the page has its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} lacks the marks of the table")
    with publish(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}{table}{mark}{after}", encoding="utf-8")


def run(out: Path, *, tiny: bool) -> None:
    path, found = out / "advise.json", dict[str, Any]()
    if not tiny:
        read(path)  # it fails now or not at all
    with tempfile.TemporaryDirectory() as folder:
        for name, params in projects(Path(folder), tiny=tiny):
            found[name] = facts(advise(params))
    table = HEAD + "".join(line for name, each in found.items() for line in rows_of(name, each))
    table += f"\nMeasured on {hardware()}; {PICTURES:,} pictures, a caption each.\n"
    print(table)
    if not tiny:
        record(path, found)
        write_page(PAGE, table)


def main(
    out: Annotated[Path, typer.Option(help="Where advise.json goes.")] = ROOT / "benchmarks/results",
    tiny: Annotated[bool, typer.Option(help="Does it work? Two-layer models, nothing is written.")] = False,
) -> None:
    """Measure and write the table."""
    exit_on_error(lambda: run(out, tiny=tiny))


if __name__ == "__main__":
    typer.run(main)
