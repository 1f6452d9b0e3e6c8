"""Stage 1's work: every image of the data sets through the frozen encoder once, into shards.

An image goes from bytes to pixels uint8 [3, side, side] in worker processes (`decoded_batches`), from pixels to patch features
[P, Dv] in the encoder, the CLS token dropped, and from there, as float16, to its row of a shard (`write_shard`).

Shards lie in a store that all experiments of a checkout share, linked into the stage's output, so an image whose features
exist is never encoded again. The output depends on data and parameters only: images in order of first appearance, a fixed
number to a shard, whatever was stored before. An image that cannot be decoded stops the run, or has no row.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import (
    BAD_ROWS,
    RESOURCE,
    PipelineError,
    fingerprint,
    link_or_copy,
    make_folder,
    remove_leftovers,
)
from pipeline.features.claims import POLL, ClaimedShards, Claims, remove_old_claims
from pipeline.features.decoding import DecodedImages, ImageFile
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.resampling import KEY, warn_of_resampling
from pipeline.features.shard_plan import NewShard, ShardPlan, holds, plan_shards
from pipeline.features.store.shards import row_bytes, write_shard
from pipeline.features.store.store import ShardSet, write_index
from pipeline.features.stream import FeatureStream
from pipeline.records import ImageError


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run did: images in the output, encoded in this run, and of these `here`, by this process; bytes on disk.

    `seconds` is what this process spent on encoding and writing, of which the encoder `waited`; `decoding` what its workers
    together spent on reading, decoding and resizing. `good` says of each image that was asked for whether it is in the output,
    `bad` what is wrong with the others.
    """

    images: int
    encoded: int
    here: int
    bytes: int
    seconds: float
    waited: float
    decoding: float
    good: np.ndarray
    bad: list[PipelineError]


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's place among `ranks`, where a launcher has started several; `wait` returns when all have come to it.

    `first_of_tree`: whether it makes the output; None: the first of all does, as all are in one work tree.
    """

    rank: int = 0
    ranks: int = 1
    wait: Callable[[], None] = lambda: None
    first_of_tree: bool | None = None

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this one makes the output."""
        return self.is_first if self.first_of_tree is None else self.first_of_tree


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
    with (
        closing(Claims()) as claims,
        closing(
            FeatureStream(
                images,
                encoder,
                workers,
                skip=skip,
                total=plan.encode,
                quiet=not processes.is_first,
                on_batch=claims.renew,
            )
        ) as stream,
    ):
        _encode_all(plan, claims, stream, encoder, quiet=not processes.is_first)
    stream.report()
    processes.wait()
    found = [holds(path, hashes[start * shard_rows : (start + 1) * shard_rows]) for start, path in enumerate(plan.paths)]
    if processes.writes:
        _make_output(out, plan.paths, encoder.row_spec(), [int(rows.sum()) for rows in found])
    processes.wait()
    remove_old_claims(folders[0])
    return _summary(out, np.concatenate([np.ones(0, bool), *found]), plan, images, stream)


def _encode_all(plan: ShardPlan, claims: Claims, stream: FeatureStream, encoder: Encoder, *, quiet: bool) -> None:
    """Returns when every new shard is there: this process writes those that it can claim, one after the other, and waits for
    those of others as long as these are at work."""
    left, told = plan.todo, False
    while left:
        mine = ClaimedShards(left, claims)
        stream.begin(mine.images())
        written = {shard.path for shard in _write_claimed(mine, plan.known, claims, stream, encoder)}
        others = [shard for shard in left if shard.path not in written]
        left = [shard for shard in others if not shard.is_written()]
        stream.passed(sum(len(shard.fresh) for shard in others) - sum(len(shard.fresh) for shard in left))
        if left and not written:
            if not told and not quiet and (holder := claims.holder(left[0].path)):
                print(
                    f"\nextract: waiting for {len(left)} shards, the first claimed by {holder}; taken over when it is lost",
                    flush=True,
                )
                told = True
            time.sleep(POLL)


def _write_claimed(
    mine: ClaimedShards, known: ShardSet, claims: Claims, stream: FeatureStream, encoder: Encoder
) -> Iterator[NewShard]:
    for shard in mine:
        _write(shard, known, stream, encoder)
        claims.release(shard.path)
        yield shard


def _write(shard: NewShard, known: ShardSet, stream: FeatureStream, encoder: Encoder) -> None:
    written = shard.hashes.copy()
    batches = _batches(shard.stored, known, stream, written)  # zeroes the hash of an image that turns out bad
    notes = {"relative_error": encoder.relative_error()}
    write_shard(shard.path, written, encoder.row_spec(), encoder.row_format, batches, notes=notes)


def _summary(out: Path, good: np.ndarray, plan: ShardPlan, images: DecodedImages, stream: FeatureStream) -> Extraction:
    return Extraction(
        images=int(good.sum()),
        encoded=int(good[np.concatenate([np.empty(0, np.int64), *(shard.fresh for shard in plan.todo)])].sum()),
        here=stream.encoded,
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
    write_index(out, [(path.name, count) for path, count in kept], spec)


def _announce(images: int, encode: int, write: int, encoder: Encoder, folder: Path, workers: int) -> None:
    """Say what it will cost before anything is spent."""
    row, kind = row_bytes(encoder.row_format), "int8" if encoder.row_format.constants else "float16"
    free, taken = shutil.disk_usage(folder).free, images * row
    size = f"{taken / 1e9:,.2f} GB" if taken >= 1e8 else f"{taken / 1e6:,.1f} MB"
    print(
        f"extract: {images:,} images × [{encoder.tokens}, {encoder.width}] {kind} = {size}; "
        f"{images - encode:,} known, {encode:,} to encode; {free / 1e9:.0f} GB free; "
        f"{encoder.batch} images a call on {encoder.device}, {workers} decoding processes",
        flush=True,
    )
    spec = encoder.row_spec()
    if KEY in spec and (folder.parent / fingerprint({key: spec[key] for key in spec if key != KEY})).exists():
        warn_of_resampling({}, str(folder.parent), "go on: all pictures are encoded anew, into a store of their own")
    need = write * (row + 40)
    if need > free:
        raise PipelineError(
            f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB free",
            where=str(folder),
            remedy="free space, set vision.storage: int8 (half), data.limit, or a folder on another disk in runtime.feature_stores",
            code=RESOURCE,
        )


def _batches(stored: np.ndarray, known: ShardSet, stream: FeatureStream, hashes: np.ndarray) -> Iterator[np.ndarray]:
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
