"""The progress line of a training run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import Accelerator
from tqdm import tqdm

from pipeline.core.devices import peak_memory_gb
from pipeline.vlm.batches import Batch

T = TypeVar("T")


class Progress:
    """Loss, lr, tokens/s, images/s, padding share, share of the time spent waiting for data, memory; the bar gives the rest."""

    def __init__(self, steps: int, done: int, name: str, accelerator: Accelerator) -> None:
        hidden = not accelerator.is_main_process
        self._bar = tqdm(total=steps, initial=done, desc=name, unit="step", mininterval=0.5, disable=hidden)
        self._device = accelerator.device
        self._began, self._waited, self._padded, self._real, self._images = time.perf_counter(), 0.0, 0, 0, 0

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The items, with the time until each comes counted as waiting."""
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def count(self, batch: Batch) -> None:
        """A micro-batch that was computed."""
        self._padded += batch.ids.numel()
        self._real += batch.tokens
        self._images += len(batch.slots)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training."""
        asked = time.perf_counter()
        yield
        self._began += time.perf_counter() - asked

    def show(self, row: dict[str, float]) -> None:
        """A step is done; the figures are made only where the line is printed, since a device's memory is asked for them."""
        if self._is_printed():
            self._set_figures(row)
        self._bar.update()

    def _is_printed(self) -> bool:
        bar = self._bar
        return not bar.disable and (bar.n + 1 >= bar.total or time.time() - bar.last_print_t >= bar.mininterval)

    def _set_figures(self, row: dict[str, float]) -> None:
        spent = time.perf_counter() - self._began
        self._bar.set_postfix(
            loss=f"{row['loss']:.4f}",
            lr=f"{row['lr']:.1e}",
            tokens=f"{self._real / spent:,.0f}/s",
            images=f"{self._images / spent:,.0f}/s",
            padding=f"{1 - self._real / self._padded:.0%}",
            wait=f"{self._waited / spent:.0%}",
            mem=f"{peak_memory_gb(self._device):.1f}GB",
            refresh=False,
        )

    def close(self) -> None:
        self._bar.close()
