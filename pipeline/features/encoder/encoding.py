"""A batch of feature rows that the device may still be computing, and its way to host memory beside the next one's computation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.core import NUMERIC, PipelineError
from pipeline.features.store.buffers import BufferPool
from pipeline.features.store.row_format import RowFormat


@dataclass(frozen=True, slots=True)
class Encoding:
    """Rows [I, *row_format.shape] on the encoder's device, whether each was finite (bool [I]), and what messages call them."""

    rows: torch.Tensor
    finite: torch.Tensor
    names: Sequence[str]

    def checked(self) -> torch.Tensor:
        """The rows, when the device has made them; raises `PipelineError` naming the first that is not finite."""
        require_finite(self.finite, self.names)
        return self.rows


def require_finite(finite: torch.Tensor, names: Sequence[str]) -> None:
    if not finite.all():
        bad = names[int(torch.argmin(finite.int()))]
        raise PipelineError("features are not finite in float16", where=bad, remedy="set vision.precision: float32", code=NUMERIC)


class Transfers:
    """Pictures to the device and rows back, on a GPU by streams of their own while it computes; elsewhere nothing is copied.

    Host memory is pinned there and used again. What a copy reads must be held until it has ended.
    """

    def __init__(self, device: torch.device, picture: tuple[int, ...], rows: RowFormat) -> None:
        self._device = device
        self._up, self._down = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self._pixels = BufferPool(picture, np.dtype(np.uint8), device)
        self._rows = BufferPool(rows.shape, rows.dtype, device)
        self._finite = BufferPool((), np.dtype(np.uint8), device)

    def held(self, pixels: torch.Tensor) -> torch.Tensor:
        """A copy of pixels uint8 [I, *picture] in host memory of its own."""
        return self._pixels.take(len(pixels)).copy_(pixels)

    def to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels that were `held`, for the current stream; not waited for."""
        if self._up is None:
            return pixels
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._up):
            moved = pixels.to(self._device, non_blocking=True)
        current.wait_stream(self._up)
        moved.record_stream(current)
        return moved

    def to_host(self, encoding: Encoding) -> Callable[[], torch.Tensor]:
        """Returns at once with what waits for the rows and gives them, or raises as `Encoding.checked` does."""
        if self._down is None:
            return lambda: encoding.checked().cpu()
        rows, finite, done = self._rows.take(len(encoding.rows)), self._finite.take(len(encoding.rows)), torch.cuda.Event()
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            rows.copy_(encoding.rows, non_blocking=True)
            finite.copy_(encoding.finite, non_blocking=True)
            done.record(self._down)

        def arrived() -> torch.Tensor:
            done.synchronize()
            require_finite(finite, encoding.names)  # which holds `encoding`, the copy's source, until here
            return rows

        return arrived


Moment = torch.cuda.Event | float


class Clock:
    """Moments of a device's work: on a GPU as it comes to them, in the order of its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        moment = torch.cuda.Event(enable_timing=True)
        moment.record(torch.cuda.current_stream(self._device))
        return moment

    @staticmethod
    def between(first: Moment, second: Moment) -> float:
        """Seconds; waits for the second."""
        if isinstance(first, float) or isinstance(second, float):
            return float(second) - float(first)  # type: ignore[arg-type]
        second.synchronize()
        return first.elapsed_time(second) / 1000
