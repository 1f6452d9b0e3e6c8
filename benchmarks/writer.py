"""What storing adds to encoding: stage 1's extraction beside a loop that decodes and encodes the same pictures for nothing.

Both start decoders in as many processes, name the encoder (a hash over its weights) and encode the same batches; only
extraction then checks, hashes, writes, syncs and links. The encoder has CLIP ViT-B/16's shape and random weights.
"""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from pipeline.core.devices import pick_device
from pipeline.features.decoding import ImageFile
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.records.images import ImageRoot

WORKERS, SHARD_ROWS = 2, 4096  # as in params.yaml
SIZE = (640, 480)


@dataclass(slots=True)
class WriterTimes:
    """Seconds of each round: extraction, what of it went by waiting for decoded pictures; the bare loop, its encoder alone.

    `once` is what a run spends before its first picture on how far its features are from float32; no round holds it.
    """

    extract: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    encoder: list[float] = field(default_factory=list)
    once: float = 0.0

    def overhead(self) -> list[float]:
        """Time that storing adds, as a share of the encoder's own, a round each."""
        times = zip(self.extract, self.bare, self.encoder, strict=True)
        return [(stored - bare) / encoder for stored, bare, encoder in times]

    def waiting(self) -> list[float]:
        """Share of the extraction that went by waiting for decoded pictures, a round each."""
        return [waited / stored for waited, stored in zip(self.waited, self.extract, strict=True)]


class _Pictures(Dataset):
    def __init__(self, files: list[ImageFile], preprocess: Callable[..., np.ndarray]) -> None:
        self._files, self._preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, item: int) -> np.ndarray:
        file = self._files[item]
        return self._preprocess(file.root.read(file.name), where=file.where)


def measure_writer(root: Path, images: int, rounds: int) -> WriterTimes:
    """Extraction and the bare loop over `images` generated pictures, taking turns at going first; nothing is kept."""
    device = pick_device("auto")
    pictures = _make_pictures(root / "pictures", images)
    with _quiet():
        encoder = Encoder(str(_make_encoder(root / "clip")), device=device, batch=16 if device.type == "cpu" else 256)
        files, hashes = distinct_images([(pictures, [f"{number}.jpg" for number in range(images)])])
    found = WriterTimes()
    began = perf_counter()
    encoder.relative_error()  # once a run, however many pictures
    found.once = perf_counter() - began
    encoder.encode(torch.zeros(encoder.batch, 3, 224, 224, dtype=torch.uint8), ["first"] * encoder.batch)  # kernels are chosen now
    for turn in range(rounds):
        sides = [_extract, _encode_only]
        for side in sides if turn % 2 else sides[::-1]:
            side(root, files, hashes, encoder, found)
    return found


def _extract(root: Path, files: list[ImageFile], hashes: np.ndarray, encoder: Encoder, found: WriterTimes) -> None:
    store, out = root / "shards", root / "features"
    began = perf_counter()
    with _quiet():
        done = extract(files, hashes, encoder, stores=[store], out=out, shard_rows=SHARD_ROWS, workers=WORKERS)
    found.extract.append(perf_counter() - began)
    found.waited.append(done.waited)
    for folder in (store, out):
        shutil.rmtree(folder)


def _encode_only(_root: Path, files: list[ImageFile], _hashes: np.ndarray, encoder: Encoder, found: WriterTimes) -> None:
    began, encoding = perf_counter(), 0.0
    encoder.spec()
    pictures = _Pictures(files, encoder.preprocess)
    for batch in DataLoader(pictures, batch_size=encoder.batch, num_workers=WORKERS, collate_fn=_stack):
        asked = perf_counter()
        encoder.encode_rows(batch, ["picture"] * len(batch))
        encoding += perf_counter() - asked
    found.bare.append(perf_counter() - began)
    found.encoder.append(encoding)


def _stack(items: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(items))


def _make_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def _make_pictures(folder: Path, count: int) -> ImageRoot:
    """JPEG files of 640 × 480 pixels, each different: smooth noise, which takes a decoder as long as a photograph."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)
        Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return ImageRoot(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the stage's own progress lines out of the benchmark's tables."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
