"""Fresh rows of the feature store: pictures decoded ahead in worker processes, encoded in full batches, given one at a time."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing

import numpy as np
import torch
from tqdm import tqdm

from pipeline.core import PipelineError
from pipeline.features.decoding import DecodedImages, decoded_batches
from pipeline.features.encoder.encoder import Encoder
from pipeline.records import ImageError


class FeatureStream:
    """Rows of the images that `begin` is given, in their order.

    `seconds` is what encoding took in all, `waited` how much of it the encoder stood still for want of a decoded picture; the
    workers' start is in neither. `decoding` is what reading, decoding and resizing took the workers together.
    `encoded` is how many have been. A bad image raises its error, or with `skip` has None for a row.

    Args:
        images: all that may be asked for.
        total: how many will be, by this process or another: what the progress bar shows.
        quiet: show and say nothing.
        on_batch: called after each.
    """

    def __init__(
        self,
        images: DecodedImages,
        encoder: Encoder,
        workers: int,
        *,
        skip: bool,
        total: int,
        quiet: bool = False,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._images, self._encoder, self._workers, self._skip, self._quiet = images, encoder, workers, skip, quiet
        self._done, self.seconds, self.waited, self.decoding, self.encoded = 0, 0.0, 0.0, 0.0, 0
        self._asked: deque[int] = deque()
        self._rows: Iterator[np.ndarray | None] = iter(())
        self._on_batch, self._first = on_batch, 0.0
        self._bar = tqdm(total=total, unit="image", desc="extract", mininterval=0.5, disable=quiet or not total)

    def begin(self, order: Iterable[int]) -> None:
        """Rows to come are those of the images that `order` names; it is asked as decoding runs ahead."""
        self._rows = self._encode(order)

    def passed(self, count: int) -> None:
        """So many images were encoded by another process."""
        self._bar.update(count)

    def __next__(self) -> np.ndarray | None:
        return next(self._rows)

    def _rows_of(self, pixels: torch.Tensor | None, errors: list[PipelineError | None]) -> list[np.ndarray | None]:
        """A batch's rows, None for a bad image."""
        stop = next((error for error in errors if error and not (self._skip and isinstance(error, ImageError))), None)
        if stop:
            raise stop
        files = [self._images.files[self._asked.popleft()] for _ in errors]
        names = [file.where for file, error in zip(files, errors, strict=True) if error is None]
        rows = iter([] if pixels is None else self._encoder.encode_rows(pixels, names).numpy())
        self.encoded += len(names)
        return [None if error else next(rows) for error in errors]

    def _noted(self, order: Iterable[int]) -> Iterator[int]:
        for number in order:
            self._asked.append(number)
            yield number

    def _encode(self, order: Iterable[int]) -> Iterator[np.ndarray | None]:
        self._asked.clear()
        started = False
        made = decoded_batches(self._images, batch=self._encoder.batch, workers=self._workers, order=self._noted(order))
        with closing(made) as loader:
            asked = time.perf_counter()
            for pixels, errors, decoding in loader:
                began = time.perf_counter()
                rows = self._rows_of(pixels, errors)
                ended = time.perf_counter()
                if started:  # starting the workers is no waiting for decoding, and no encoding either
                    self.waited += began - asked
                self.seconds += ended - (asked if started else began)
                started = True
                self.decoding += decoding
                self._done += len(rows)
                self._bar.update(len(rows))
                self._on_batch()
                self._estimate()
                yield from rows
                asked = time.perf_counter()

    def _estimate(self) -> None:
        """Say once, early in a long run, how long it will take."""
        size, total = self._encoder.batch, self._bar.total or 0
        if self._done == 8 * size and not self._quiet and total > 16 * size:
            rate = 7 * size / (self.seconds - self._first)
            self._bar.write(f"extract: about {(total - self._bar.n) / rate:,.0f} s to go at {rate:,.0f} images/s")
        elif self._done == size:
            self._first = self.seconds

    def close(self) -> None:
        """End the workers and the progress bar, so that an error stands on a line of its own."""
        if isinstance(self._rows, Generator):
            self._rows.close()
        self._bar.close()

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
