"""Pictures decoded in worker processes, ahead of whoever computes with them; one that cannot be decoded is told, not lost."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.core import BAD_ROWS, PipelineError
from pipeline.features.encoder.preprocess import Preprocessor
from pipeline.records import ImageError, Images, digest

SHARED = 48_000_000  # bytes: a container has 64 MB as a rule, and what does not fit ends or hangs a worker
AHEAD = 2  # pieces that each worker has under way
Piece = tuple[torch.Tensor | None, list[PipelineError | None], float]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image's bytes are: a name within an image root."""

    root: Images
    name: str

    @property
    def where(self) -> str:
        return self.root.place(self.name)


class DecodedImages(Dataset):
    """Decodes one image an item, in worker processes, and tells the seconds it took. `bytes` are those of one's pixels.

    A bad image is returned, not raised, so that its message survives. An `ImageError` says that the decoder refused
    the image; any other error that its file could not be read, which stops a run whatever `data.on_error` says.
    """

    def __init__(self, files: list[ImageFile], hashes: np.ndarray, preprocess: Preprocessor) -> None:
        self.files, self._hashes, self._preprocess = files, hashes, preprocess
        self.bytes = 3 * math.prod(preprocess.size())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[np.ndarray | PipelineError, float]:
        began = time.perf_counter()
        return self.decode(item), time.perf_counter() - began

    def decode(self, item: int) -> np.ndarray | PipelineError:
        """Pixels uint8 [3, side, side] of one image, or what is wrong with it."""
        file = self.files[item]
        try:
            data = file.root.read(file.name)
        except ImageError as error:
            return PipelineError(error.what, where=error.where, remedy=error.remedy, code=error.code)
        if digest(data) != self._hashes[item].tobytes():
            return PipelineError("changed while it was being read", where=file.where, remedy="dvc repro", code=BAD_ROWS)
        try:
            return self._preprocess(data, where=file.where)
        except ImageError as error:
            return ImageError(error.what, where=error.where, remedy=error.remedy)  # a new one holds no bytes

    def error(self, item: int) -> PipelineError | None:
        """What is wrong with one image; None when it can be decoded."""
        found = self.decode(item)
        return found if isinstance(found, PipelineError) else None


def decoded_batches(images: DecodedImages, *, batch: int, workers: int, order: Iterable[int] | None = None) -> Iterator[Piece]:
    """Batches of the images that `order` names (all, in turn), decoded ahead.

    Each is pixels uint8 [k, 3, side, side] or None, each image's error or None, and the seconds of decoding. `order` is asked
    for more as the workers run out of work. They send a batch in pieces that all together stay within `SHARED` bytes of shared
    memory, of which a container may have little.
    """
    order = range(len(images)) if order is None else order
    loader = DataLoader(
        images,
        batch_sampler=_pieces(order, batch, piece_of(batch, images.bytes, workers)),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=_be_quiet,
        prefetch_factor=AHEAD if workers else None,
    )
    waiting: list[Piece] = []
    for found in loader:
        waiting.append(found)
        if sum(len(errors) for _, errors, _ in waiting) >= batch:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def piece_of(batch: int, picture: int, workers: int) -> int:
    """Images a worker sends at once: a half, a quarter and so on of a batch, as the shared memory asks."""
    parts = 1
    while parts < batch and AHEAD * workers * picture * -(-batch // parts) > SHARED:
        parts *= 2
    return -(-batch // parts)


def _pieces(order: Iterable[int], batch: int, piece: int) -> Iterator[list[int]]:
    """Numbers in lists of `piece`, of which some make a batch."""
    numbers = iter(order)
    while whole := list(islice(numbers, batch)):
        yield from (whole[start : start + piece] for start in range(0, len(whole), piece))


def _joined(pieces: list[Piece]) -> Piece:
    pixels = [found for found, _, _ in pieces if found is not None]
    errors = [error for _, found, _ in pieces for error in found]
    return torch.cat(pixels) if len(pixels) > 1 else next(iter(pixels), None), errors, sum(seconds for _, _, seconds in pieces)


def _be_quiet(_: int) -> None:
    """A worker whose parent was interrupted has nothing to report: the parent says it."""
    sys.excepthook = lambda *_: None


def _stack(items: list[tuple[np.ndarray | PipelineError, float]]) -> Piece:
    """Pixels uint8 [k, 3, side, side] of the images that could be decoded, each image's error, and the seconds of decoding."""
    pixels = [item for item, _ in items if isinstance(item, np.ndarray)]
    errors = [item if isinstance(item, PipelineError) else None for item, _ in items]
    return torch.from_numpy(np.stack(pixels)) if pixels else None, errors, sum(seconds for _, seconds in items)
