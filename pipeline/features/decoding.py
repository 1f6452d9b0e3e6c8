"""Pictures decoded in worker processes, ahead of whoever computes with them; one that cannot be decoded is told, not lost."""

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.core import BAD_ROWS, PipelineError
from pipeline.features.encoder.preprocess import Preprocessor
from pipeline.records import ImageError, Images, digest


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image's bytes are: a name within an image root."""

    root: Images
    name: str

    @property
    def where(self) -> str:
        return self.root.place(self.name)


class DecodedImages(Dataset):
    """Decodes one image an item, in worker processes, and tells the seconds it took.

    A bad image is returned, not raised, so that its message survives. An `ImageError` says that the decoder refused
    the image; any other error that its file could not be read, which stops a run whatever `data.on_error` says.
    """

    def __init__(self, files: list[ImageFile], hashes: np.ndarray, preprocess: Preprocessor) -> None:
        self.files, self._hashes, self._preprocess = files, hashes, preprocess

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


def decoded_batches(images: DecodedImages, *, batch: int, workers: int) -> DataLoader:
    """Batches in order, decoded ahead: pixels uint8 [k, 3, side, side] or None, each image's error or None, seconds of decoding."""
    return DataLoader(images, batch_size=batch, num_workers=workers, collate_fn=_stack, worker_init_fn=_be_quiet)


def _be_quiet(_: int) -> None:
    """A worker whose parent was interrupted has nothing to report: the parent says it."""
    sys.excepthook = lambda *_: None


def _stack(
    items: list[tuple[np.ndarray | PipelineError, float]],
) -> tuple[torch.Tensor | None, list[PipelineError | None], float]:
    """Pixels uint8 [k, 3, side, side] of the images that could be decoded, each image's error, and the seconds of decoding."""
    pixels = [item for item, _ in items if isinstance(item, np.ndarray)]
    errors = [item if isinstance(item, PipelineError) else None for item, _ in items]
    return torch.from_numpy(np.stack(pixels)) if pixels else None, errors, sum(seconds for _, seconds in items)
