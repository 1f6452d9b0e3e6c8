"""Stage 1's work: every image of the data sets through the frozen encoder once, into shards.

Reads records and images; writes shards to a store that all experiments of a checkout share and links them into the
stage's output, so an image whose features exist is never encoded again. The output depends on data and parameters only:
images in order of first appearance, a fixed number to a shard, whatever was stored before. An image that cannot be decoded
stops the run, or its row in the shard stays a hole: zeros under a hash of zeros, which no image has.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.core import (
    BAD_ROWS,
    RESOURCE,
    PipelineError,
    fingerprint,
    link_or_copy,
    make_folder,
    prefetch,
    remove_leftovers,
    write_json,
)
from pipeline.features.decoding import ImageFile, Pixels, Stream
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.store.shards import Shard, row_bytes, shard_name, write_shard
from pipeline.features.store.store import INDEX, ShardSet
from pipeline.records import ImageError, Images, digest


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
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Extraction:
    """Write the features of distinct images [n] (hashes uint8 [n, 32]) to `out`; returns what was done.

    New shards go to the first store; rows that any of them holds are taken over. Raises `PipelineError` when an image is
    bad (named; with `skip` it is left out and told instead), features are not finite, or the disk is too small (both figures).

    Of `ranks` processes each encodes every `ranks`-th new shard; `wait` returns when all have come to it, then the first
    process makes the output.
    """
    spec, folders = encoder.spec(), [store / fingerprint(encoder.spec()) for store in stores]
    make_folder(folders[0])
    remove_leftovers(folders[0])
    parts = [slice(start, start + shard_rows) for start in range(0, len(files), shard_rows)]
    names = [shard_name(fingerprint(spec), hashes[part]) for part in parts]
    pixels = Pixels(files, hashes, encoder.preprocess)
    found = [
        next((path for folder in folders if (path := folder / name).exists() and _holds(path, part, pixels, skip=skip)), None)
        for name, part in zip(names, parts, strict=True)
    ]
    todo = [number for number, path in enumerate(found) if path is None]
    known = ShardSet([Shard(path) for folder in folders if todo for path in sorted(folder.glob("*.h5"))], encoder.rows)
    rows = [known.find(hashes[parts[number]]) for number in todo]
    fresh = {number: parts[number].start + np.flatnonzero(stored < 0) for number, stored in zip(todo, rows, strict=True)}
    encoded = sum(map(len, fresh.values()))
    wait()  # nobody writes before all have seen the same store, or a shard may be nobody's
    if not rank:
        _announce(len(files), encoded, sum(map(len, rows)), encoder, folders[0])
    mine = todo[rank::ranks]
    wanted = np.concatenate([np.empty(0, np.int64), *(fresh[number] for number in mine)])
    chosen = [files[i] for i in wanted.tolist()], hashes[wanted]
    with closing(Stream(*chosen, encoder, workers, skip=skip, quiet=bool(rank))) as stream:
        for number, stored in list(zip(todo, rows, strict=True))[rank::ranks]:
            written = hashes[parts[number]].copy()
            batches = _batches(stored, known, stream, written)  # which makes holes of bad ones in `written`
            notes = {"relative_error": encoder.relative_error()}
            write_shard(folders[0] / names[number], written, spec, encoder.rows, batches, notes=notes)
    stream.report()
    wait()
    paths = [path or folders[0] / name for path, name in zip(found, names, strict=True)]
    if not rank:
        _make_output(out, paths, spec, hashes, shard_rows)
    wait()
    size = sum(file.stat().st_size for file in out.iterdir())
    good = np.concatenate([np.ones(0, bool), *(_is_there(path) for path in paths)])
    bad = [_why(pixels, item) for item in np.flatnonzero(~good).tolist()]
    return Extraction(int(good.sum()), encoded - stream.skipped, size, stream.seconds, stream.waited, stream.decoding, good, bad)


def _why(pixels: Pixels, item: int) -> PipelineError:
    """What is wrong with an image that was bad a moment ago."""
    error = pixels.error(item)
    if not isinstance(error, ImageError):
        raise error or PipelineError("changed while it was being read", where=pixels.files[item].where, code=BAD_ROWS)
    return error


def _is_there(path: Path) -> np.ndarray:
    """For each row of a shard whether an image is in it: bool [rows]."""
    return Shard(path).hashes.any(1)


def _holds(path: Path, part: slice, pixels: Pixels, *, skip: bool) -> bool:
    """Whether a stored shard can be taken: every image is in it that can be decoded, and bad ones may be left out."""
    for row in np.flatnonzero(~_is_there(path)).tolist():
        error = pixels.error(part.start + row)
        if error is not None and not skip:
            raise error
        if not isinstance(error, ImageError):  # it can be decoded now
            return False
    return True


def _make_output(out: Path, shards: list[Path], spec: dict[str, Any], hashes: np.ndarray, shard_rows: int) -> None:
    """Link the shards that this data needs into the stage's output, with their list."""
    shutil.rmtree(out, ignore_errors=True)
    make_folder(out)
    linked = [link_or_copy(path, out / path.name) for path in shards]
    if not all(linked):
        print(f"extract: {shards[0].parent} and {out} cannot share files, so features take their space twice")
    counts = [len(hashes[start : start + shard_rows]) for start in range(0, len(hashes), shard_rows)]
    listed = [{"file": path.name, "rows": count} for path, count in zip(shards, counts, strict=True)]
    write_json(out / INDEX, {"shards": listed, "spec": spec})


def _announce(images: int, encode: int, write: int, encoder: Encoder, folder: Path) -> None:
    """Say what it will cost before anything is spent."""
    row, kind = row_bytes(encoder.rows), "int8" if encoder.rows.constants else "float16"
    free = shutil.disk_usage(folder).free
    print(
        f"extract: {images:,} images × [{encoder.tokens}, {encoder.width}] {kind} = {images * row / 1e9:.2f} GB; "
        f"{images - encode:,} known, {encode:,} to encode; {free / 1e9:.0f} GB free",
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


def _batches(stored: np.ndarray, known: ShardSet, stream: Stream, hashes: np.ndarray) -> Iterator[np.ndarray]:
    """A shard's rows in order, in batches of bounded size: row `stored[i]` of the known ones, or fresh where it is -1.

    A fresh one that is bad becomes zeros, and so does its hash in `hashes` [rows, 32].
    """
    for start in range(0, len(stored), 256):
        numbers = stored[start : start + 256]
        batch = np.empty((len(numbers), *known.rows.shape), known.rows.dtype)
        old = np.flatnonzero(numbers >= 0)
        batch[old] = known.stored(numbers[old])
        for i in np.flatnonzero(numbers < 0).tolist():
            row = next(stream)
            if row is None:
                hashes[start + i] = 0
            batch[i] = 0 if row is None else row
        yield batch


def distinct_images(
    sources: Iterable[tuple[Images, Iterable[str]] | tuple[Images, Iterable[str], Callable[[bytes], bool]]],
    *,
    threads: int = 1,
    missing: list[PipelineError] | None = None,
) -> tuple[list[ImageFile], np.ndarray]:
    """Distinct images by content, in order of first appearance: files [n] and hashes uint8 [n, 32].

    Args:
        sources: where the images are, their names and, where not all of them count, whether the one of a hash does.
        missing: takes up what is wrong with images that cannot be read; None = the first one is raised.
    """
    files: list[ImageFile] = []
    hashes: list[bytes] = []
    seen: set[bytes] = set()

    def named() -> Iterator[tuple[ImageFile, Callable[[bytes], bool]]]:
        for root, names, *wanted in sources:
            asked: set[str] = set()
            for name in names:
                if name not in asked:
                    asked.add(name)
                    yield ImageFile(root, name), wanted[0] if wanted else bool

    def read(job: tuple[ImageFile, Callable[[bytes], bool]]) -> bytes | PipelineError:
        try:
            return digest(job[0].root.read(job[0].name))
        except ImageError as error:
            return ImageError(error.what, where=error.where, remedy=error.remedy)

    done = prefetch(named(), read, depth=4 * threads, threads=threads)
    for (file, is_wanted), key in tqdm(done, desc="extract: reading images", unit="image", mininterval=0.5, leave=False):
        if isinstance(key, PipelineError):
            if missing is None:
                raise key
            missing.append(key)
        elif key not in seen and is_wanted(key):
            seen.add(key)
            files.append(file)
            hashes.append(key)
    return files, np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
