"""Stage 1's work: every image of the data sets through the frozen encoder once, into shards.

Reads records and images; writes shards to a store that all experiments of a checkout share and links them into the
stage's output, so an image whose features exist is never encoded again. The output depends on data and parameters only:
images in order of first appearance, a fixed number to a shard, whatever was stored before.
"""

import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline.ahead import run_ahead
from pipeline.errors import RESOURCE, PipelineError
from pipeline.features import INDEX, ShardSet
from pipeline.files import link_or_copy, make_folder, remove_leftovers, write_json
from pipeline.images import ImageError, Images, digest
from pipeline.shards import Shard, row_bytes, shard_name, write_shard
from pipeline.vision import Encoder, Preprocessor, fingerprint


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image's bytes are: a name within an image root."""

    root: Images
    name: str

    @property
    def where(self) -> str:
        return f"{self.root.path}: {self.name}"


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run did: images in the output, encoded now, bytes on disk, seconds spent encoding and, of them, waiting."""

    images: int
    encoded: int
    bytes: int
    seconds: float
    waited: float


class _Pixels(Dataset):
    """Decodes one image an item, in worker processes; a bad image is returned, not raised, so that its message survives."""

    def __init__(self, files: list[ImageFile], hashes: np.ndarray, preprocess: Preprocessor) -> None:
        self._files, self._hashes, self._preprocess = files, hashes, preprocess

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, item: int) -> np.ndarray | PipelineError:
        file = self._files[item]
        try:
            data = file.root.read(file.name)
            if digest(data) != self._hashes[item].tobytes():
                raise ImageError("changed while it was being read", where=file.where)
            return self._preprocess(data, where=file.where)
        except PipelineError as error:
            return error


def _be_quiet(_: int) -> None:
    """A worker whose parent was interrupted has nothing to report: the parent says it."""
    sys.excepthook = lambda *_: None


def _stack(items: list[np.ndarray | PipelineError]) -> torch.Tensor | PipelineError:
    bad = next((item for item in items if isinstance(item, PipelineError)), None)
    return bad or torch.from_numpy(np.stack([item for item in items if isinstance(item, np.ndarray)]))


def extract(
    files: list[ImageFile],
    hashes: np.ndarray,
    encoder: Encoder,
    *,
    stores: Sequence[Path],
    out: Path,
    shard_rows: int,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Extraction:
    """Write the features of distinct images [n] (hashes uint8 [n, 32]) to `out`; returns what was done.

    New shards go to the first store; rows that any of them holds are taken over. Raises `PipelineError` when an image is
    bad (named), features are not finite, or the disk is too small (both figures).

    Of `ranks` processes each encodes every `ranks`-th new shard; `wait` returns when all have come to it, then the first
    process makes the output.
    """
    spec, folders = encoder.spec(), [store / fingerprint(encoder.spec()) for store in stores]
    make_folder(folders[0])
    remove_leftovers(folders[0])
    parts = [slice(start, start + shard_rows) for start in range(0, len(files), shard_rows)]
    names = [shard_name(fingerprint(spec), hashes[part]) for part in parts]
    found = [next((folder / name for folder in folders if (folder / name).exists()), None) for name in names]
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
    with closing(_Stream([files[i] for i in wanted.tolist()], hashes[wanted], encoder, workers, quiet=bool(rank))) as stream:
        for number, stored in list(zip(todo, rows, strict=True))[rank::ranks]:
            write_shard(folders[0] / names[number], hashes[parts[number]], spec, encoder.rows, _batches(stored, known, stream))
    stream.report()
    wait()
    if not rank:
        _make_output(out, [path or folders[0] / name for path, name in zip(found, names, strict=True)], spec, hashes, shard_rows)
    wait()
    size = sum(file.stat().st_size for file in out.iterdir())
    return Extraction(len(files), encoded, size, stream.seconds, stream.waited)


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


class _Stream:
    """Fresh rows in order, one at a time; decoding runs ahead in worker processes.

    `seconds` is what encoding took in all, `waited` how much of it the encoder stood still for want of a decoded picture.
    """

    def __init__(self, files: list[ImageFile], hashes: np.ndarray, encoder: Encoder, workers: int, *, quiet: bool) -> None:
        self._files, self._encoder, self._done, self._quiet = files, encoder, 0, quiet
        self.seconds, self.waited = 0.0, 0.0
        self._loader = DataLoader(
            _Pixels(files, hashes, encoder.preprocess),
            batch_size=encoder.batch,
            num_workers=workers,
            collate_fn=_stack,
            worker_init_fn=_be_quiet,
        )
        self._rows = self._encode() if files else iter(())

    def __next__(self) -> np.ndarray:
        return next(self._rows)

    def _encode(self) -> Iterator[np.ndarray]:
        size, first = self._encoder.batch, 0.0
        with tqdm(total=len(self._files), unit="image", desc="extract", mininterval=0.5, disable=self._quiet) as bar:
            asked = time.perf_counter()
            for batch in self._loader:
                if isinstance(batch, PipelineError):
                    raise batch
                began = time.perf_counter()
                names = [file.where for file in self._files[self._done : self._done + len(batch)]]
                rows = self._encoder.encode_rows(batch, names).numpy()
                ended = time.perf_counter()
                if self._done:  # starting the workers is no waiting for decoding
                    self.waited += began - asked
                self.seconds += ended - asked
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
        """End the progress bar, so that an error stands on a line of its own."""
        if isinstance(self._rows, Generator):
            self._rows.close()

    def report(self) -> None:
        """Say when the encoder was kept waiting."""
        if self._done and not self._quiet and self.waited > 0.05 * self.seconds:
            share, each = self.waited / self.seconds, self.waited / self._done
            print(
                f"extract: {share:.0%} of the time went by waiting for decoded pictures ({1000 * each:.1f} ms each) "
                "-> raise runtime.workers",
                flush=True,
            )


def _batches(stored: np.ndarray, known: ShardSet, stream: _Stream) -> Iterator[np.ndarray]:
    """A shard's rows in order, in batches of bounded size: row `stored[i]` of the known ones, or fresh where it is -1."""
    for start in range(0, len(stored), 256):
        numbers = stored[start : start + 256]
        batch = np.empty((len(numbers), *known.rows.shape), known.rows.dtype)
        old = np.flatnonzero(numbers >= 0)
        batch[old] = known.stored(numbers[old])
        for i in np.flatnonzero(numbers < 0):
            batch[i] = next(stream)
        yield batch


def distinct_images(sources: Iterable[tuple[Images, Iterable[str]]], *, threads: int = 1) -> tuple[list[ImageFile], np.ndarray]:
    """Distinct images by content, in order of first appearance: files [n] and hashes uint8 [n, 32]."""
    files: list[ImageFile] = []
    hashes: list[bytes] = []
    seen: set[bytes] = set()

    def named() -> Iterator[ImageFile]:
        for root, names in sources:
            asked: set[str] = set()
            for name in names:
                if name not in asked:
                    asked.add(name)
                    yield ImageFile(root, name)

    read = run_ahead(named(), lambda file: digest(file.root.read(file.name)), depth=4 * threads, threads=threads)
    for file, key in tqdm(read, desc="extract: reading images", unit="image", mininterval=0.5, leave=False):
        if key not in seen:
            seen.add(key)
            files.append(file)
            hashes.append(key)
    return files, np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
