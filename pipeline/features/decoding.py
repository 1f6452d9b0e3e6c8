"""Pictures decoded in worker processes, ahead of whoever computes with them; one that cannot be decoded is told, not lost."""

import math
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from pipeline.core import BAD_ROWS, SAFE_FORK, PipelineError, prefetch
from pipeline.features.decoder_pool import AHEAD, Decoded, DecoderPool
from pipeline.features.encoder.preprocess import Preprocessor
from pipeline.records import ImageError, Images, digest

SHARED = 1_000_000_000  # bytes of pictures that are decoded ahead
Batch = tuple[torch.Tensor | None, list[PipelineError | None], float]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image's bytes are: a name within an image root."""

    root: Images
    name: str

    @property
    def where(self) -> str:
        return self.root.place(self.name)


class DecodedImages:
    """Decodes one image an item, in worker processes, and tells the seconds it took. `shape` is [3, side, side].

    A bad image is returned, not raised, so that its message survives. An `ImageError` says that the decoder refused
    the image; any other error that its file could not be read, which stops a run whatever `data.on_error` says.
    """

    def __init__(self, files: list[ImageFile], hashes: np.ndarray, preprocess: Preprocessor) -> None:
        self.files, self._hashes, self._preprocess = files, hashes, preprocess
        self.shape: tuple[int, ...] = (3, *preprocess.size())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[np.ndarray | PipelineError, float]:
        began = time.perf_counter()
        return self.decode(item), time.perf_counter() - began

    def place(self, item: int) -> str:
        """What messages call one image."""
        return self.files[item].where

    def decode_all(self, items: list[int]) -> Decoded:
        """Several images, one after the other."""
        found = [self[item] for item in items]
        pixels = [each for each, _ in found if isinstance(each, np.ndarray)]
        errors = [each if isinstance(each, PipelineError) else None for each, _ in found]
        stacked = np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8)
        return Decoded(stacked, errors, sum(seconds for _, seconds in found))

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


def decoded_batches(
    images: DecodedImages, *, batch: int, workers: int, order: Iterable[int] | None = None
) -> Generator[Batch, Any, None]:
    """Batches of the images that `order` names (all, in turn), decoded ahead by `workers` processes. To be closed.

    Each is pixels uint8 [k, 3, side, side] or None, each image's error or None, and the seconds of decoding; the pixels are
    good until the next batch is asked for. `order` is asked for more as the workers run out of work.
    """
    piece = piece_of(batch, math.prod(images.shape), workers)
    whole = -(-batch // piece)
    with closing(_decoded(images, _pieces(range(len(images)) if order is None else order, batch, piece), piece, workers)) as found:
        waiting: list[Decoded] = []
        for decoded in found:
            waiting.append(decoded)
            if whole > 1:
                decoded.pixels = decoded.pixels.copy()
            if sum(len(each.errors) for each in waiting) >= batch:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)


def _decoded(images: DecodedImages, pieces: Iterator[list[int]], piece: int, workers: int) -> Generator[Decoded, Any, None]:
    if workers and SAFE_FORK:
        with closing(DecoderPool(images, piece=piece, workers=workers)) as pool:
            yield from pool.decode(pieces)
    elif workers:  # decoders let other threads go on meanwhile
        with closing(prefetch(pieces, images.decode_all, depth=AHEAD * workers, threads=workers)) as made:
            yield from (decoded for _, decoded in made)
    else:
        yield from map(images.decode_all, pieces)


def piece_of(batch: int, picture: int, workers: int) -> int:
    """Images a worker decodes at once: a half, a quarter and so on of a batch, so that all that is under way stays in `SHARED`."""
    parts = 1
    while parts < batch and AHEAD * workers * picture * -(-batch // parts) > SHARED:
        parts *= 2
    return -(-batch // parts)


def _pieces(order: Iterable[int], batch: int, piece: int) -> Iterator[list[int]]:
    """Numbers in lists of `piece`, of which some make a batch."""
    numbers = iter(order)
    while whole := list(islice(numbers, batch)):
        yield from (whole[start : start + piece] for start in range(0, len(whole), piece))


def _joined(pieces: list[Decoded]) -> Batch:
    pixels = pieces[0].pixels if len(pieces) == 1 else np.concatenate([piece.pixels for piece in pieces])
    errors = [error for piece in pieces for error in piece.errors]
    return torch.from_numpy(pixels) if len(pixels) else None, errors, sum(piece.seconds for piece in pieces)
