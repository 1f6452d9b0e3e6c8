"""Stage 1's work: every image of the data sets through the frozen encoder once, into shards.

An image goes from bytes to pixels uint8 [3, side, side] in worker processes (`decoded_batches`), from pixels to patch features
[P, Dv] in the encoder, the CLS token dropped, and from there, as float16, to its row of a shard (`write_shard`).

Shards lie in a store that all experiments of a checkout share, linked into the stage's output, so an image whose features
exist is never encoded again. The output depends on data and parameters only: images in order of first appearance, a fixed
number to a shard, whatever was stored before. An image that cannot be decoded stops the run, or has no row.
"""

import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.core import (
    BAD_ROWS,
    RESOURCE,
    PipelineError,
    fingerprint,
    link_or_copy,
    make_folder,
    remove_leftovers,
    seal,
    write_json,
)
from pipeline.features.decoding import DecodedImages, ImageFile, decoded_batches
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.shard_plan import NewShard, ShardPlan, holds, plan_shards
from pipeline.features.store.shards import row_bytes, write_shard
from pipeline.features.store.store import INDEX, ShardSet
from pipeline.records import ImageError


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run did: images in the output, encoded now, bytes on disk, seconds spent encoding and, of them, waiting.

    `decoding` is what the workers together spent on reading, decoding and resizing. `good` says of each image that was asked
    for whether it is in the output, `bad` what is wrong with the others.
    """

    images: int
    encoded: int
    bytes: int
    seconds: float
    waited: float
    decoding: float
    good: np.ndarray
    bad: list[PipelineError]


@dataclass(frozen=True, slots=True)
class Processes:
    """Of `ranks` processes each encodes every `ranks`-th new shard; `wait` returns when all have come to it."""

    rank: int = 0
    ranks: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all and makes the output."""
        return self.rank == 0


def extract(
    files: list[ImageFile],
    hashes: np.ndarray,
    encoder: Encoder,
    *,
    stores: Sequence[Path],
    out: Path,
    shard_rows: int,
    workers: int,
    skip: bool = False,
    processes: Processes = Processes(),
) -> Extraction:
    """Write the features of distinct images [n] (hashes uint8 [n, 32]) to `out`; returns what was done.

    New shards go to the first store; rows that any of them holds are taken over. Raises `PipelineError` when an image is
    bad (named; with `skip` it is left out and told instead), features are not finite, or the disk is too small (both figures).
    """
    folders = [store / fingerprint(encoder.row_spec()) for store in stores]
    make_folder(folders[0])
    for folder in stores[0].iterdir():  # of other encoders too
        remove_leftovers(folder)
    images = DecodedImages(files, hashes, encoder.preprocess)
    plan = plan_shards(images, hashes, encoder, folders, shard_rows, skip=skip)
    processes.wait()  # nobody writes before all have seen the same store, or a shard may be nobody's
    if processes.is_first:
        _announce(len(files), plan.encode, sum(len(shard.stored) for shard in plan.todo), encoder, folders[0], workers)
    mine = plan.todo[processes.rank :: processes.ranks]
    wanted = np.concatenate([np.empty(0, np.int64), *(shard.fresh for shard in mine)])
    chosen = [files[i] for i in wanted.tolist()], hashes[wanted]
    with closing(FeatureStream(*chosen, encoder, workers, skip=skip, quiet=not processes.is_first)) as stream:
        for shard in mine:
            _write(shard, plan.known, stream, encoder)
    stream.report()
    processes.wait()
    found = [holds(path, hashes[start * shard_rows : (start + 1) * shard_rows]) for start, path in enumerate(plan.paths)]
    if processes.is_first:
        _make_output(out, plan.paths, encoder.row_spec(), [int(rows.sum()) for rows in found])
    processes.wait()
    return _summary(out, np.concatenate([np.ones(0, bool), *found]), plan, images, stream)


def _write(shard: NewShard, known: ShardSet, stream: "FeatureStream", encoder: Encoder) -> None:
    written = shard.hashes.copy()
    batches = _batches(shard.stored, known, stream, written)  # zeroes the hash of an image that turns out bad
    notes = {"relative_error": encoder.relative_error()}
    write_shard(shard.path, written, encoder.row_spec(), encoder.row_format, batches, notes=notes)


def _summary(out: Path, good: np.ndarray, plan: ShardPlan, images: DecodedImages, stream: "FeatureStream") -> Extraction:
    return Extraction(
        images=int(good.sum()),
        encoded=plan.encode - stream.skipped,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
        seconds=stream.seconds,
        waited=stream.waited,
        decoding=stream.decoding,
        good=good,
        bad=[_decoding_error(images, item) for item in np.flatnonzero(~good).tolist()],
    )


def _decoding_error(images: DecodedImages, item: int) -> PipelineError:
    """What is wrong with an image that was bad a moment ago."""
    error = images.error(item)
    if not isinstance(error, ImageError):
        raise error or PipelineError("changed while it was being read", where=images.files[item].where, code=BAD_ROWS)
    return error


def _make_output(out: Path, shards: list[Path], spec: dict[str, Any], counts: list[int]) -> None:
    """Link the shards that this data needs into the stage's output, with their list; `counts`: rows of each, 0 = no shard."""
    kept = [(path, count) for path, count in zip(shards, counts, strict=True) if count]
    shutil.rmtree(out, ignore_errors=True)
    make_folder(out)
    linked = [link_or_copy(path, out / path.name) for path, _ in kept]
    if not all(linked):
        print(f"extract: {shards[0].parent} and {out} cannot share files, so features take their space twice")
    listed = [{"file": path.name, "rows": count} for path, count in kept]
    write_json(out / INDEX, seal({"shards": listed, "spec": spec}))


def _announce(images: int, encode: int, write: int, encoder: Encoder, folder: Path, workers: int) -> None:
    """Say what it will cost before anything is spent."""
    row, kind = row_bytes(encoder.row_format), "int8" if encoder.row_format.constants else "float16"
    free = shutil.disk_usage(folder).free
    print(
        f"extract: {images:,} images × [{encoder.tokens}, {encoder.width}] {kind} = {images * row / 1e9:.2f} GB; "
        f"{images - encode:,} known, {encode:,} to encode; {free / 1e9:.0f} GB free; "
        f"{encoder.batch} images a call on {encoder.device}, {workers} decoding processes",
        flush=True,
    )
    need = write * (row + 40)
    if need > free:
        raise PipelineError(
            f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB free",
            where=str(folder),
            remedy="free space, set vision.storage: int8 (half), data.limit, or a folder on another disk in runtime.feature_stores",
            code=RESOURCE,
        )


def _batches(stored: np.ndarray, known: ShardSet, stream: "FeatureStream", hashes: np.ndarray) -> Iterator[np.ndarray]:
    """A shard's rows in order, in batches of bounded size: row `stored[i]` of the known ones, or fresh where it is -1.

    A fresh one that is bad has no row, and its hash in `hashes` [rows, 32] becomes zeros.
    """
    for start in range(0, len(stored), 256):
        numbers = stored[start : start + 256]
        batch = np.empty((len(numbers), *known.row_format.shape), known.row_format.dtype)
        old = np.flatnonzero(numbers >= 0)
        batch[old] = known.stored(numbers[old])
        for i in np.flatnonzero(numbers < 0).tolist():
            row = next(stream)
            if row is None:
                hashes[start + i] = 0
            else:
                batch[i] = row
        yield batch[hashes[start : start + 256].any(1)]


class FeatureStream:
    """Fresh rows in order, one at a time; decoding runs ahead in worker processes.

    `seconds` is what encoding took in all, `waited` how much of it the encoder stood still for want of a decoded picture; the
    workers' start is in neither. `decoding` is what reading, decoding and resizing took the workers together.
    A bad image raises its error, or with `skip` has None for a row and is counted in `skipped`.
    """

    def __init__(
        self, files: list[ImageFile], hashes: np.ndarray, encoder: Encoder, workers: int, *, skip: bool, quiet: bool
    ) -> None:
        self._files, self._encoder, self._done, self._skip, self._quiet = files, encoder, 0, skip, quiet
        self.seconds, self.waited, self.decoding, self.skipped = 0.0, 0.0, 0.0, 0
        self._loader = decoded_batches(DecodedImages(files, hashes, encoder.preprocess), batch=encoder.batch, workers=workers)
        self._rows = self._encode() if files else iter(())

    def __next__(self) -> np.ndarray | None:
        return next(self._rows)

    def _rows_of(self, pixels: torch.Tensor | None, errors: list[PipelineError | None]) -> list[np.ndarray | None]:
        """A batch's rows, None for a bad image."""
        stop = next((error for error in errors if error and not (self._skip and isinstance(error, ImageError))), None)
        if stop:
            raise stop
        files = self._files[self._done : self._done + len(errors)]
        names = [file.where for file, error in zip(files, errors, strict=True) if error is None]
        rows = iter([] if pixels is None else self._encoder.encode_rows(pixels, names).numpy())
        self.skipped += len(files) - len(names)
        return [None if error else next(rows) for error in errors]

    def _encode(self) -> Iterator[np.ndarray | None]:
        size, first = self._encoder.batch, 0.0
        with tqdm(total=len(self._files), unit="image", desc="extract", mininterval=0.5, disable=self._quiet) as bar:
            asked = time.perf_counter()
            for pixels, errors, decoding in self._loader:
                began = time.perf_counter()
                rows = self._rows_of(pixels, errors)
                ended = time.perf_counter()
                if self._done:  # starting the workers is no waiting for decoding, and no encoding either
                    self.waited += began - asked
                self.seconds += ended - (asked if self._done else began)
                self.decoding += decoding
                self._done += len(rows)
                bar.update(len(rows))
                if self._done == 8 * size and not self._quiet and len(self._files) > 16 * size:
                    rate = 7 * size / (self.seconds - first)
                    bar.write(f"extract: about {(len(self._files) - self._done) / rate:,.0f} s to go at {rate:,.0f} images/s")
                elif self._done == size:
                    first = self.seconds
                yield from rows  # last: nobody asks beyond the last row
                asked = time.perf_counter()

    def close(self) -> None:
        """End the progress bar, so that an error stands on a line of its own, and the workers."""
        if isinstance(self._rows, Generator):
            self._rows.close()
        self._loader.close()

    def report(self) -> None:
        """Say what an image cost, and when the encoder was kept waiting for decoded ones."""
        if not self._done or self._quiet:
            return
        share, each = self.waited / self.seconds, 1000 * self.decoding / self._done
        more = " -> raise runtime.workers" if share > 0.05 else ""
        print(
            f"extract: {self._done / self.seconds:,.1f} images/s; decoding took {each:.2f} ms of a worker an image, "
            f"{share:.0%} of the time went by waiting for it{more}",
            flush=True,
        )
