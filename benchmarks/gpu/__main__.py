"""Everything that one card can tell, in at most eight minutes.

    python -m benchmarks.gpu [--only SECTION] [--out FOLDER] [--tiny]

A JSON line a section on stdout as it ends, all of them merged into FOLDER/gpu.json; a run of some sections leaves the others
there. A section that fails or takes too long has an `error` in its line. `--tiny` runs two-layer models on any machine, to
see that every section works, and writes nothing.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cold import in_child
from benchmarks.figures import read, record
from benchmarks.gpu import ceilings, encoder, extraction, generation, store, training
from benchmarks.gpu.runner import Figures, Section, Setting, run_section
from pipeline.core.frame import exit_on_error

TOTAL = 470.0  # seconds of all sections together; the last ones get what is left


class Name(StrEnum):
    CEILINGS = "ceilings"
    ENCODER = "encoder"
    EXTRACTION = "extraction"
    STORE = "store"
    SFT = "sft"
    GENERATION = "generation"
    PRETRAIN = "pretrain"


# What each does, and the seconds after which it is stopped. The longest is last: it takes whatever the others have left.
SECTIONS: dict[Name, tuple[Section, float]] = {
    Name.CEILINGS: (ceilings.measure, 25),
    Name.ENCODER: (encoder.measure, 90),
    Name.EXTRACTION: (extraction.measure, 50),
    Name.STORE: (store.measure, 45),
    Name.SFT: (training.sft, 60),
    Name.GENERATION: (generation.measure, 30),
    Name.PRETRAIN: (training.pretrain, 330),
}


def run(names: list[Name], folder: Path, *, tiny: bool) -> Iterator[tuple[Name, Figures]]:
    """Each section's figures as it ends."""
    ends = time.monotonic() + TOTAL
    for name in names:
        section, cap = SECTIONS[name]
        left = ends - time.monotonic()
        yield name, run_section(section, folder, tiny=tiny, cap=min(cap, max(left, 1.0)))


def find_card() -> None:
    """Raises `PipelineError` where there is no card to measure."""
    Setting(Path(), tiny=False, ends=0.0).device  # noqa: B018


def main(
    only: Annotated[list[Name] | None, typer.Option(help="A section; may be given several times.")] = None,
    out: Annotated[Path, typer.Option(help="Where gpu.json goes.")] = Path("benchmarks/results"),
    folder: Annotated[Path | None, typer.Option(help="Where temporary files go; they are removed.")] = None,
    tiny: Annotated[bool, typer.Option(help="Does it work? Two-layer models, nothing is written.")] = False,
) -> None:
    """Measure what one card makes of the pipeline."""
    path = out / "gpu.json"
    if not tiny:
        out.mkdir(parents=True, exist_ok=True)
        read(path)  # it fails now or not at all
        in_child(find_card)
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-gpu-") as temporary:
        names = [name for name in SECTIONS if not only or name in only]
        for name, figures in run(names, Path(temporary), tiny=tiny):
            print(json.dumps({"section": name.value} | figures), flush=True)
            if not tiny:  # in a process of its own: this one must not touch the card, or it could fork no more
                in_child(partial(record, path, {name.value: figures}))


if __name__ == "__main__":
    exit_on_error(lambda: typer.run(main))
