"""`python -m pipeline.features verify | info | show`: is a feature store sound, what is in it, do its features look sane?

Reads data/features (or another folder). `verify` reads every byte; `show` also reads the images that params.yaml names.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pipeline.core import ARTEFACT, PipelineError, enter_project, exit_on_error, run_command, unseal
from pipeline.features.store.shards import Shard
from pipeline.features.store.store import INDEX, FeatureStore, member_folders
from pipeline.params import load
from pipeline.records import Record, decode, digest, open_dataset

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Folder = Annotated[Path, typer.Argument(help="The folder of shards.")]
DEFAULT = Path("data/features")


@app.command()
def info(folder: Folder = DEFAULT) -> None:
    """What the store holds and which encoder made it."""
    exit_on_error(lambda: _of_each(_info, *enter_project(reads=[folder])))


@app.command()
def verify(folder: Folder = DEFAULT) -> None:
    """Read every byte: seals, checksums, finite values. Bad rows are listed by image; exit code 4 when there are any."""
    exit_on_error(lambda: _of_each(_verify, *enter_project(reads=[folder])))


@app.command()
def show(
    folder: Folder = DEFAULT,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("features.png"),
    count: Annotated[int, typer.Option(min=1, max=64, help="Images to show.")] = 12,
) -> None:
    """A contact sheet: images beside their patch features, whose three main directions are drawn as red, green, blue."""

    def work() -> None:
        read, written = enter_project(reads=[folder], writes=[out])
        _show(read, written, count)

    exit_on_error(work)


def _of_each(work: Callable[[Path], None], folder: Path) -> None:
    """The store of each encoder, where there are several."""
    for part in member_folders(folder):
        work(part)


def _info(folder: Path) -> None:
    store = FeatureStore(folder)
    size = sum((folder / shard.path.name).stat().st_size for shard in store.shards)
    table = Table(title=f"{folder}: {len(store):,} images, {len(store.shards)} shards, {size / 1e6:,.1f} MB", title_justify="left")
    table.add_column("encoder")
    table.add_column("")
    table.add_row("row", f"[{store.tokens}, {store.width}] float16")
    if errors := [shard.relative_error for shard in store.shards if shard.relative_error is not None]:
        table.add_row("distance from float32", f"{max(errors):.2g} of a row's norm")
    for key, value in sorted(store.spec.items()):
        table.add_row(key, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    Console(width=120).print(table)


def _verify(folder: Path) -> None:
    try:
        shards = unseal((folder / INDEX).read_text(encoding="utf-8"))["shards"]
        listed = [(str(entry["file"]), int(entry["rows"])) for entry in shards]
    except (OSError, ValueError, KeyError, TypeError):
        raise PipelineError("no feature store", where=str(folder), remedy="dvc repro extract", code=ARTEFACT) from None
    bad, rows = [], 0
    with tqdm(total=sum(count for _, count in listed), unit="row", desc="verify", mininterval=0.5) as bar:
        for name, _ in listed:
            try:
                shard = Shard(folder / name)
            except PipelineError as error:
                bad.append(error.line())
                continue
            bad += [
                f"{shard.path.name}: row {row}, image {shard.hashes[row].tobytes().hex()}: {why}" for row, why in shard.bad_rows()
            ]
            rows += len(shard)
            bar.update(len(shard))
    for line in bad:
        print(line, file=sys.stderr)
    if bad:
        remedy = "delete the shard here, in .dvc/features and in DVC's cache, then dvc repro -f extract"
        raise PipelineError(f"{len(bad)} problems", where=str(folder), remedy=remedy, code=ARTEFACT)
    FeatureStore(folder)  # and the shards are those that the index lists
    print(f"{folder}: {rows:,} rows in {len(listed)} shards, every byte as it was written")


def _show(folder: Path, out: Path, count: int) -> None:
    stores, source = [FeatureStore(part) for part in member_folders(folder)], open_dataset(load().data.pretrain)
    files: dict[bytes, tuple[str, bytes]] = {}
    for record in source.records():
        for name in record.images if isinstance(record, Record) else ():
            data = source.images.read(name)
            files.setdefault(digest(data), (name, data))
        if len(files) >= count:
            break
    shown = list(files.items())[:count]
    keys = np.frombuffer(b"".join(key for key, _ in shown), np.uint8).reshape(-1, 32)
    colours = main_directions(torch.cat([store.read(store.locate(keys)) for store in stores], dim=2))
    side = 128
    columns = min(4, len(shown))
    sheet = Image.new("RGB", (columns * (2 * side + 12), -(-len(shown) // columns) * (side + 8)), "white")
    for i, (_, (name, data)) in enumerate(shown):
        x, y = i % columns * (2 * side + 12), i // columns * (side + 8)
        sheet.paste(decode(data, where=name).resize((side, side)), (x, y))
        sheet.paste(Image.fromarray(colours[i]).resize((side, side), Image.Resampling.NEAREST), (x + side, y))
    sheet.save(out)
    print(f"{out}: {len(shown)} images, each beside its {stores[0].tokens} patches")


def main_directions(features: torch.Tensor) -> np.ndarray:
    """Patch features [n, P, Dv] -> uint8 [n, side, side, 3]: their three principal components over all n images."""
    count, tokens, width = features.shape
    side = round(tokens**0.5)
    values = features.float().reshape(-1, width)
    torch.manual_seed(0)
    _, _, directions = torch.pca_lowrank(values, q=3)
    parts = (values - values.mean(0)) @ directions  # [n × P, 3]
    low, high = parts.quantile(0.01, 0), parts.quantile(0.99, 0)
    scaled = ((parts - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return (scaled * 255).to(torch.uint8).reshape(count, side, side, 3).numpy()


if __name__ == "__main__":
    run_command(app)
