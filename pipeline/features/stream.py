"""Fresh rows of the feature store: pictures decoded ahead in worker processes, encoded in full batches, given one at a time."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pipeline.core import PipelineError, prefetch
from pipeline.features.decoding import DecodedImages, decoded_batches
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.encoding import Clock, Moment, Transfers
from pipeline.records import ImageError

IN_FLIGHT = 2  # batches that are encoded or on their way to the host beside the one that is written


@dataclass(frozen=True, slots=True)
class _Job:
    """A decoded batch: pixels of the good pictures, their names, each picture's error, seconds of decoding, when it came and
    how long it was waited for."""

    pixels: torch.Tensor | None
    names: list[str]
    errors: list[PipelineError | None]
    decoding: float
    came: float
    waited: float

    def where(self) -> str:
        return self.names[0] if self.names else ""


@dataclass(frozen=True, slots=True)
class _Begun:
    """Gives the batch's rows; and when the device began and ended it."""

    arrived: Callable[[], torch.Tensor] | None
    start: Moment
    end: Moment


class FeatureStream:
    """Rows of the images that `begin` is given, in their order.

    A thread encodes one batch while the workers decode the next ones and the caller writes those before: at most `IN_FLIGHT` + 1
    batches are between decoding and the caller, whichever of the three is slowest. On a GPU copies go on meanwhile.

    `seconds` is what all this took, `waited` how much of it the encoder stood still for want of a decoded picture; the
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
        self._on_batch, self._first, device = on_batch, 0.0, encoder.tower.device
        self._clock, self._transfers = Clock(device), Transfers(device, images.shape, encoder.row_format)
        self._bar = tqdm(total=total, unit="image", desc="extract", mininterval=0.5, disable=quiet or not total)

    def begin(self, order: Iterable[int]) -> None:
        """Rows to come are those of the images that `order` names; it is asked as decoding runs ahead."""
        self._rows = self._encode(order)

    def passed(self, count: int) -> None:
        """So many images were encoded by another process."""
        self._bar.update(count)

    def __next__(self) -> np.ndarray | None:
        return next(self._rows)

    def _noted(self, order: Iterable[int]) -> Iterator[int]:
        for number in order:
            self._asked.append(number)
            yield number

    def _jobs(self, order: Iterable[int]) -> Iterator[_Job]:
        """Decoded batches in memory of their own: the workers' is used again for the next."""
        self._asked.clear()
        made = decoded_batches(self._images, batch=self._encoder.batch, workers=self._workers, order=self._noted(order))
        with closing(made) as loader:
            asked = time.perf_counter()
            for pixels, errors, decoding in loader:
                came = time.perf_counter()
                files = [self._images.files[self._asked.popleft()] for _ in errors]
                names = [file.where for file, error in zip(files, errors, strict=True) if error is None]
                held = None if pixels is None else self._transfers.held(pixels)
                yield _Job(held, names, errors, decoding, came, came - asked)
                asked = time.perf_counter()

    def _begin(self, job: _Job) -> _Begun:
        """In the encoder's thread: done when the device has been told what to do."""
        start, arrived = self._clock.now(), None
        if job.pixels is not None:
            encoding = self._encoder.begin(self._transfers.to_device(job.pixels), job.names)
            arrived = self._transfers.to_host(encoding)
        return _Begun(arrived, start, self._clock.now())

    def _encode(self, order: Iterable[int]) -> Iterator[np.ndarray | None]:
        since, before = 0.0, None
        with closing(prefetch(self._jobs(order), self._begin, depth=IN_FLIGHT, where=_Job.where)) as batches:
            for job, begun in batches:
                self._require_good(job.errors)
                rows = iter([] if begun.arrived is None else begun.arrived().numpy())
                now = time.perf_counter()
                self.seconds += now - (since or job.came)  # starting the workers is no waiting for decoding, and no encoding either
                if before is not None:
                    self.waited += min(job.waited, max(0.0, self._clock.between(before.end, begun.start)))
                since, before = now, begun
                self.encoded += len(job.names)
                self.decoding += job.decoding
                self._done += len(job.errors)
                self._bar.update(len(job.errors))
                self._on_batch()
                self._estimate()
                yield from (None if error else next(rows) for error in job.errors)

    def _require_good(self, errors: list[PipelineError | None]) -> None:
        """Raises the first that stops the run."""
        stop = next((error for error in errors if error and not (self._skip and isinstance(error, ImageError))), None)
        if stop:
            raise stop

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
        more = " -> raise runtime.workers" if share > 0.05 and self._workers < (os.cpu_count() or 1) else ""
        print(
            f"extract: {self._done / self.seconds:,.1f} images/s; decoding took {each:.2f} ms of a worker an image, "
            f"{share:.0%} of the time went by waiting for it{more}",
            flush=True,
        )
