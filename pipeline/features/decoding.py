"""Images, in order, through the decoder and the frozen encoder: decoding runs ahead in worker processes.

Reads image files by name and gives one row of features at a time; an image that cannot be decoded is told, not lost.
"""

import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline.core import BAD_ROWS, PipelineError
from pipeline.features.encoder.encoder import Encoder
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


class Pixels(Dataset):
    """Decodes one image an item, in worker processes, and tells the seconds it took.

    A bad image is returned, not raised, so that its message survives. An `ImageError` of the decoder says that the image is
    bad; any other error that it could not be asked.
    """

    def __init__(self, files: list[ImageFile], hashes: np.ndarray, preprocess: Preprocessor) -> None:
        self.files, self._hashes, self._preprocess = files, hashes, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[np.ndarray | PipelineError, float]:
        began = time.perf_counter()
        return self.decode(item), time.perf_counter() - began

    def decode(self, item: int) -> np.ndarray | PipelineError:
        """Pixels uint8 [3, S, S] of one image, or what is wrong with it."""
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


def _be_quiet(_: int) -> None:
    """A worker whose parent was interrupted has nothing to report: the parent says it."""
    sys.excepthook = lambda *_: None


def _stack(
    items: list[tuple[np.ndarray | PipelineError, float]],
) -> tuple[torch.Tensor | None, list[PipelineError | None], float]:
    """Pixels uint8 [k, 3, S, S] of the images that could be decoded, each image's error, and the seconds of decoding."""
    pixels = [item for item, _ in items if isinstance(item, np.ndarray)]
    errors = [item if isinstance(item, PipelineError) else None for item, _ in items]
    return torch.from_numpy(np.stack(pixels)) if pixels else None, errors, sum(seconds for _, seconds in items)


class Stream:
    """Fresh rows in order, one at a time; decoding runs ahead in worker processes.

    `seconds` is what encoding took in all, `waited` how much of it the encoder stood still for want of a decoded picture,
    `decoding` what reading, decoding and resizing took the workers together.
    A bad image raises its error, or with `skip` has None for a row and is counted in `skipped`.
    """

    def __init__(
        self, files: list[ImageFile], hashes: np.ndarray, encoder: Encoder, workers: int, *, skip: bool, quiet: bool
    ) -> None:
        self._files, self._encoder, self._done, self._skip, self._quiet = files, encoder, 0, skip, quiet
        self.seconds, self.waited, self.decoding, self.skipped = 0.0, 0.0, 0.0, 0
        self._loader = DataLoader(
            Pixels(files, hashes, encoder.preprocess),
            batch_size=encoder.batch,
            num_workers=workers,
            collate_fn=_stack,
            worker_init_fn=_be_quiet,
        )
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
                if self._done:  # starting the workers is no waiting for decoding
                    self.waited += began - asked
                self.seconds += ended - asked
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
        """End the progress bar, so that an error stands on a line of its own."""
        if isinstance(self._rows, Generator):
            self._rows.close()

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
