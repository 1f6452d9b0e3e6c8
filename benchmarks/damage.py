"""Does the feature store survive being killed, and is every flipped bit noticed?

    python -m benchmarks.damage [--kills 200] [--flips 1000]

Extracts 64 pictures of the embedded world with the embedded CLIP: a part first, then all. Each kill is followed by a run
that nobody disturbs, whose files must be those of a run that was never killed. Then single bits of the finished store are
flipped, every part in turn, before `verify` and before the rows are read as training reads them.
Prints two tables; adds its figures to benchmarks/results/store.json.
"""

import random
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.figures import read, record
from benchmarks.kills import Ended, Trials, run
from pipeline.core.errors import ARTEFACT, PipelineError
from pipeline.core.frame import exit_on_error
from pipeline.core.quiet import quiet_libraries
from pipeline.features.__main__ import app as features
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.store.store import INDEX, FeatureStore
from pipeline.records.images import ImageRoot

IMAGES, MODEL = "data/easyvqa/images.zip", "data/models/clip"
PICTURES, FIRST, SHARD_ROWS = 64, 24, 16  # the first run ends with a shard that is not full, which the second replaces
SEAL_BYTES = 40


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one file of a store that have one meaning: `spans` are (start, stop)."""

    file: Path
    name: str
    spans: list[tuple[int, int]]

    @property
    def bits(self) -> int:
        return 8 * sum(stop - start for start, stop in self.spans)

    def place(self, bit: int) -> tuple[int, int]:
        """Offset in the file and mask of a bit, counted through the spans."""
        for start, stop in self.spans:
            if bit < 8 * (stop - start):
                return start + bit // 8, 1 << bit % 8
            bit -= 8 * (stop - start)
        raise IndexError(bit)


def parts(folder: Path) -> list[Part]:
    """Every byte of a store in exactly one part: rows, each table, attributes, seal, and the rest as structure; the index."""
    index = folder / INDEX
    found = [Part(index, "index", [(0, index.stat().st_size)])]
    for path in sorted(folder.glob("*.h5")):
        size = path.stat().st_size
        with h5py.File(path, "r") as file:
            tables = {name: (file[name].id.get_offset(), file[name].id.get_storage_size()) for name in file}
            texts = [str(value).encode() for value in file.attrs.values() if isinstance(value, str)]
            texts += [name.encode() for name in file.attrs]
        spans = {name: [(start, start + length)] for name, (start, length) in tables.items()}
        spans["seal"] = [(size - SEAL_BYTES, size)]
        taken = np.zeros(size, bool)
        for start, stop in (span for group in spans.values() for span in group):
            taken[start:stop] = True
        data, attributes = path.read_bytes(), np.zeros(size, bool)
        for text in texts:
            place = data.index(text)
            attributes[place : place + len(text)] = True
        spans["attributes"] = _runs(attributes & ~taken)
        spans["structure"] = _runs(~attributes & ~taken)
        found += [Part(path, "rows" if name == "features" else name, where) for name, where in spans.items()]
    return found


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def sample(found: list[Part], count: int, rng: random.Random) -> Iterator[tuple[Part, int]]:
    """`count` different bits, the kinds of parts taking turns, each bit of a kind as likely as the others."""
    kinds: dict[str, list[Part]] = {}
    for part in found:
        kinds.setdefault(part.name, []).append(part)
    for number, (name, members) in enumerate(sorted(kinds.items())):
        wanted = count // len(kinds) + (number < count % len(kinds))
        total = sum(part.bits for part in members)
        if wanted > total:
            raise ValueError(f"{name} has {total} bits, {wanted} asked for")
        for bit in rng.sample(range(total), wanted):
            for part in members:
                if bit < part.bits:
                    yield part, bit
                    break
                bit -= part.bits


@contextmanager
def flipped(part: Part, bit: int) -> Iterator[None]:
    """One bit of a file is the other one."""
    offset, mask = part.place(bit)

    def flip() -> None:
        with part.file.open("r+b") as file:
            file.seek(offset)
            value = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([value ^ mask]))

    mode = part.file.stat().st_mode
    part.file.chmod(0o644)
    flip()
    try:
        yield
    finally:
        flip()
        part.file.chmod(mode)


def read_all(folder: Path) -> None:
    """Every row in random batches, as training reads them."""
    store = FeatureStore(folder)
    for rows in np.array_split(np.random.default_rng(0).permutation(len(store)), 1 + len(store) // 8):
        store.read(rows)


def noticed(part: Part, by_training: bool) -> bool:
    """Is the part's file, as it is now, refused in one line that names it, by `verify` or by reading the rows?"""
    folder = part.file.parent
    ended = run(partial(read_all, folder) if by_training else partial(features, ["verify", str(folder)]))
    return ended.code == ARTEFACT and _names(ended, part)


def _names(ended: Ended, part: Part) -> bool:
    said = ended.text.splitlines()
    name = part.file.parent.name if part.name == "index" else part.file.name
    return said[-1].startswith("error: ") and any(name in line for line in said)


def extractions() -> list[Callable[[Path], None]]:
    """Two jobs on a folder: extract some of the embedded world's pictures, then all of them, with its CLIP."""
    images = ImageRoot(IMAGES)
    names = sorted(name for name in zipfile.ZipFile(IMAGES).namelist() if name.endswith(".png"))[:PICTURES]
    files, hashes = distinct_images([(images, names)])
    encoder = Encoder(MODEL, device=torch.device("cpu"), batch=SHARD_ROWS)

    def job(count: int, folder: Path) -> None:
        extract(
            files[:count], hashes[:count], encoder, stores=[folder / "store"], out=folder / "out", shard_rows=SHARD_ROWS, workers=0
        )

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        job(1, Path(folder))  # what libraries load when they are first used, they load before the forks
    return [partial(job, count) for count in (FIRST, len(files))]


def kill_all(trials: Trials, count: int, rng: random.Random, console: Console) -> dict[str, int]:
    """Every point of `trials` once, then random moments up to `count`; every fourth of those runs is killed twice."""
    points = trials.points()
    jobs = [partial(trials.kill_at, *point) for point in points]
    for number in range(count - len(points)):
        jobs.append(partial(trials.kill_after, *(rng.random() for _ in range(2 if number % 4 == 3 else 1))))
    problems = [problem for job in tqdm(jobs, unit="kill", desc="kills", mininterval=0.5) if (problem := job())]
    table = Table("killed", "runs")
    for (name, half), runs in sorted(Counter((trials.calls[call], half) for call, half in points).items()):
        table.add_row(f"{'half-way through' if half else 'before'} {name}", str(runs))
    table.add_row("at a random moment", str(len(jobs) - len(points)))
    table.add_row("same bytes after resuming", f"{len(jobs) - len(problems)} of {len(jobs)}")
    console.print(table)
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    return {"kills_identical": len(jobs) - len(problems), "kills_total": len(jobs)}


def flip_all(folder: Path, count: int, rng: random.Random, console: Console) -> dict[str, int]:
    """Flip `count` bits of the store in `folder` one after the other."""
    total: Counter[str] = Counter()
    verified, trained = total.copy(), total.copy()
    for part, bit in tqdm(list(sample(parts(folder), count, rng)), unit="bit", desc="flips", mininterval=0.5):
        total[part.name] += 1
        with flipped(part, bit):
            verified[part.name] += noticed(part, by_training=False)
            trained[part.name] += noticed(part, by_training=True)
    table = Table("part of the store", "bits flipped", "found by verify", "stopped training's read")
    for name in sorted(total):
        table.add_row(name, str(total[name]), str(verified[name]), str(trained[name]))
    console.print(table)
    return {
        "bitflips_detected": verified.total(),
        "bitflips_total": total.total(),
        "bitflips_in_rows_detected_by_training": trained["rows"],
        "bitflips_in_rows_total": total["rows"],
    }


def main(
    kills: Annotated[int, typer.Option(min=1, help="Runs to kill; never fewer than one at each call that changes a file.")] = 200,
    flips: Annotated[int, typer.Option(min=1, max=5000, help="Bits to flip.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the random moments and bits.")] = 0,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/store.json"),
) -> None:
    """Kill extractions and flip bits of what they wrote; fails unless all is well."""
    exit_on_error(lambda: _main(kills, flips, random.Random(seed), results))


def _main(kills: int, flips: int, rng: random.Random, results: Path) -> None:
    quiet_libraries()
    read(results)  # a file that cannot take the figures is better known now
    torch.set_num_threads(1)  # a forked process has one
    steps, console = extractions(), Console()
    with tempfile.TemporaryDirectory() as name:
        figures = kill_all(Trials(steps, Path(name)), kills, rng, console)
        for step in steps:
            run(partial(step, Path(name)))
        figures |= flip_all(Path(name) / "out", flips, rng, console)
    record(results, figures)
    found, wanted = ([figures[key] for key in figures if key.endswith("_total") == total] for total in (False, True))
    if found != wanted:
        raise PipelineError(f"{found} of {wanted} kills, bits and bits in rows came out well", code=ARTEFACT)


if __name__ == "__main__":
    typer.run(main)
