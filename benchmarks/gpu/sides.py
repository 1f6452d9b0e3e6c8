"""What takes turns in training: the pipeline with stored features, with its live encoder, and the tuned plain trainer.

Each side can run so many steps, with a window that clocks the middle ones.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.gpu.clock import Window, wait_for, weights_bytes
from benchmarks.gpu.plain import PlainTrainer
from benchmarks.gpu.world import threads
from pipeline.core.devices import pick_precision
from pipeline.features.sources import FeatureSource
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.schedule import Execution, Schedule
from pipeline.vlm.model.attention import choose_attention
from pipeline.vlm.model.freezing import freeze
from pipeline.vlm.model.packed_attention import PACKED
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.loop import MIXED, train

LR = 1e-5  # small: weights are random and speed is what is asked
WARM = 8  # steps of a run before any is clocked: the live encoder's batch is four


class TrainingSide(Protocol):
    """Runs so many steps of 64 rows."""

    compiled: bool
    compile_seconds: float

    def run(self, steps: int, window: Window) -> None: ...

    def warm_up(self) -> float:
        """Whatever happens once: programs are made, buffers pinned. Returns about what a step takes afterwards, in seconds."""
        ...

    def weights(self) -> int:
        """Bytes that it holds between its turns."""
        ...


class EnoughError(Exception):
    """Ends a training run whose clocked steps are done: nobody waits for the rest of its epoch."""


class Waiting:
    """A feature source whose `stream` tells a window how long it waited for the next batch to be loaded."""

    def __init__(self, source: FeatureSource, window: Window) -> None:
        self._source, self._window = source, window

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def stream(self, items: Iterable[Any]) -> Iterator[Any]:
        return self._source.stream(self._timed(iter(items)))

    def _timed(self, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self._window.waited += time.perf_counter() - asked
            if item is None:
                return
            yield item


@dataclass(slots=True)
class Ours:
    """The pipeline's own training loop, put together as a stage does, compiled where there is a card."""

    model: VisionLanguageModel
    source: FeatureSource
    table: TokenTable
    image_id: int
    device: torch.device
    batch_size: int
    pass_tokens: int
    train: str
    held: nn.Module | None = None  # the live encoder
    compiled: bool = False
    compile_seconds: float = 0.0
    why_not: str = ""
    _accelerator: Any = field(init=False, default=None)
    _packed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        precision = pick_precision("auto", self.device)
        self._accelerator = Accelerator(mixed_precision=MIXED[precision], cpu=self.device.type == "cpu")
        attention = choose_attention(self.model.language_model, self.device, int(self.table.lengths.max()))
        self.model.language_model.set_attn_implementation(attention)
        self._packed = attention == PACKED
        freeze(self.model, self.train)
        self.compiled = self.device.type == "cuda"

    def run(self, steps: int, window: Window) -> None:
        """The first steps of a run over the whole table, so that all runs have the same plan and lengths."""

        def on_step(row: dict[str, float]) -> None:
            window(row)
            if window.steps == steps:
                raise EnoughError

        examples = Examples(self.table, Waiting(self.source, window), self.image_id)
        epochs = -(-steps * self.batch_size // len(self.table))
        schedule = Schedule(
            epochs=epochs, batch_size=self.batch_size, micro_tokens=self.pass_tokens, lr=LR, warmup=0.0, min_lr=1.0,
            weight_decay=0.0, clip_norm=1.0, seed=0,
        )  # fmt: skip
        execution = Execution(name="ours", threads=threads(), packed=self._packed, compiled=self.compiled)
        with suppress(EnoughError):
            train(self.model, examples, schedule, self._accelerator, execution=execution, callbacks=Callbacks(on_step=on_step))
        self._accelerator.free_memory()
        self.model.zero_grad(set_to_none=True)

    def warm_up(self) -> float:
        """A run that compiles, then one that shows what its steps take; where compiling fails, layers stay as they are."""
        try:
            first = self._timed()
        except Exception as error:
            if not self.compiled:
                raise
            self.compiled, self.why_not = False, f"{type(error).__name__}: {error}"[:160]
            first = self._timed()
        again = self._timed()
        self.compile_seconds = max(0.0, first - again)
        return again / WARM

    def _timed(self) -> float:
        wait_for(self.device)
        began = time.perf_counter()
        self.run(WARM, Window(0, 0, self.device))
        wait_for(self.device)
        return time.perf_counter() - began

    def weights(self) -> int:
        return weights_bytes(self.model, *([self.held] if self.held is not None else []))


@dataclass(slots=True)
class Plain:
    """The tuned plain trainer."""

    trainer: PlainTrainer

    @property
    def compiled(self) -> bool:
        return self.trainer.compiled

    @property
    def compile_seconds(self) -> float:
        return self.trainer.compile_seconds

    def run(self, steps: int, window: Window) -> None:
        self.trainer.run(steps, window)

    def warm_up(self) -> float:
        return self.trainer.choose()

    def weights(self) -> int:
        return self.trainer.held_bytes()
