"""Stage 1's work: every image of the data sets through the frozen encoder once, into shards.

Reads records and images; writes shards to a store that all experiments of a checkout share and links them into the
stage's output, so an image whose features exist is never encoded again. The output depends on data and parameters only:
images in order of first appearance, a fixed number to a shard, whatever was stored before.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline.errors import RESOURCE, PipelineError
from pipeline.features import INDEX
from pipeline.files import link_or_copy, remove_leftovers, write_json
from pipeline.images import ImageError, ImageRoot, digest
from pipeline.shards import Shard, shard_name, write_shard
from pipeline.vision import Encoder, Preprocessor, fingerprint


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image's bytes are: a name within an image root."""

    root: ImageRoot
    name: str

    @property
    def where(self) -> str:
        return f"{self.root.path}: {self.name}"


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run did: images in the output, encoded now, bytes on disk, seconds spent encoding."""

    images: int
    encoded: int
    bytes: int
    seconds: float


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


class _Known:
    """Rows that earlier runs stored under this fingerprint, by image hash."""

    def __init__(self, folder: Path | None) -> None:
        self._shards = [Shard(path) for path in sorted(folder.glob("*.h5"))] if folder else []
        self._rows = {
            digest_.tobytes(): (number, row)
            for number, shard in enumerate(self._shards)
            for row, digest_ in enumerate(shard.hashes)
        }

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def read(self, key: bytes, out: np.ndarray) -> None:
        number, row = self._rows[key]
        self._shards[number].read(np.array([row]), out[None])


def extract(
    files: list[ImageFile], hashes: np.ndarray, encoder: Encoder, *, store: Path, out: Path, shard_rows: int, workers: int
) -> Extraction:
    """Write the features of distinct images [n] (hashes uint8 [n, 32]) to `out`; returns what was done.

    Raises `PipelineError` when an image is bad (named), features are not finite, or the disk is too small (both figures).
    """
    spec = encoder.spec()
    folder = store / fingerprint(spec)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    parts = [slice(start, start + shard_rows) for start in range(0, len(files), shard_rows)]
    names = [shard_name(fingerprint(spec), hashes[part]) for part in parts]
    todo = [number for number, name in enumerate(names) if not (folder / name).exists()]
    known = _Known(folder if todo else None)
    wanted = [i for number in todo for i in range(len(files))[parts[number]] if hashes[i].tobytes() not in known]
    _announce(len(files), len(wanted), sum(len(hashes[parts[number]]) for number in todo), spec, folder)
    started = time.perf_counter()
    stream = _encode([files[i] for i in wanted], hashes[wanted], encoder, workers)
    for number in todo:
        batches = _rows(hashes[parts[number]], known, stream, (encoder.tokens, encoder.width))
        write_shard(folder / names[number], hashes[parts[number]], spec, batches)
    seconds = time.perf_counter() - started if wanted else 0.0
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    linked = [link_or_copy(folder / name, out / name) for name in names]
    if not all(linked):
        print(f"extract: {store} and {out} cannot share files, so features take their space twice")
    shards = [{"file": name, "rows": len(hashes[part])} for name, part in zip(names, parts, strict=True)]
    write_json(out / INDEX, {"shards": shards, "spec": spec})
    size = sum(file.stat().st_size for file in out.iterdir())
    return Extraction(len(files), len(wanted), size, seconds)


def _announce(images: int, encode: int, write: int, spec: dict, folder: Path) -> None:
    """Say what it will cost before anything is spent."""
    row = spec["tokens"] * spec["width"] * 2
    free = shutil.disk_usage(folder).free
    print(
        f"extract: {images:,} images × [{spec['tokens']}, {spec['width']}] float16 = {images * row / 1e9:.2f} GB; "
        f"{images - encode:,} known, {encode:,} to encode; {free / 1e9:.0f} GB free",
        flush=True,
    )
    need = write * (row + 40)
    if need > free:
        raise PipelineError(
            f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB free",
            where=str(folder),
            remedy="free space or set data.limit",
            code=RESOURCE,
        )


def _encode(files: list[ImageFile], hashes: np.ndarray, encoder: Encoder, workers: int) -> Iterator[np.ndarray]:
    """One row float16 [P, Dv] at a time, in order; decoding runs ahead in worker processes."""
    if not files:
        return
    pixels = DataLoader(
        _Pixels(files, hashes, encoder.preprocess),
        batch_size=encoder.batch,
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=_be_quiet,
    )
    done, began = 0, time.perf_counter()
    with tqdm(total=len(files), unit="image", desc="extract", mininterval=0.5) as bar:
        for batch in pixels:
            if isinstance(batch, PipelineError):
                raise batch
            yield from encoder.encode(batch, [file.where for file in files[done : done + len(batch)]]).numpy()
            done += len(batch)
            bar.update(len(batch))
            if done == encoder.batch:  # starting the workers and the first batch do not count
                began = time.perf_counter()
            elif done == 8 * encoder.batch:
                rate = (done - encoder.batch) / (time.perf_counter() - began)
                bar.write(f"extract: about {(len(files) - done) / rate:,.0f} s to go at {rate:,.0f} images/s")


def _rows(hashes: np.ndarray, known: _Known, stream: Iterator[np.ndarray], row: tuple[int, int]) -> Iterable[np.ndarray]:
    """A shard's rows in order, each from the store or fresh from the encoder, in batches of bounded size."""
    for start in range(0, len(hashes), 256):
        part = hashes[start : start + 256]
        batch = np.empty((len(part), *row), np.float16)
        for position, digest_ in enumerate(part):
            key = digest_.tobytes()
            if key in known:
                known.read(key, batch[position])
            else:
                batch[position] = next(stream)
        yield batch


def distinct_images(sources: Iterable[tuple[ImageRoot, Iterable[str]]]) -> tuple[list[ImageFile], np.ndarray]:
    """Distinct images by content, in order of first appearance: files [n] and hashes uint8 [n, 32]."""
    files: list[ImageFile] = []
    hashes: list[bytes] = []
    seen: set[bytes] = set()
    for root, names in sources:
        asked: set[str] = set()
        for name in names:
            if name in asked:
                continue
            asked.add(name)
            key = digest(root.read(name))
            if key not in seen:
                seen.add(key)
                files.append(ImageFile(root, name))
                hashes.append(key)
    return files, np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
