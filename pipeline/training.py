"""One training loop for both training stages: it knows what trains and where patch features come from, nothing else.

accelerate owns the device, mixed precision and scaling. The loss of a step is the sum over its supervised tokens divided
by their number, however the step is cut into micro-batches, so accumulating changes nothing but rounding.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from pipeline.batches import Batch, collate, plan_epoch, split_by_tokens
from pipeline.errors import NUMERIC, USAGE, PipelineError
from pipeline.hardware import peak_memory_gb
from pipeline.model import VisionLanguageModel
from pipeline.sources import FeatureSource
from pipeline.tokens import TokenTable

Job = TypeVar("Job")
Made = TypeVar("Made")
T = TypeVar("T")
MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Schedule:
    """The numbers of a training run (see the sections `pretrain` and `sft` of params.yaml)."""

    epochs: int
    batch_size: int
    micro_tokens: int
    lr: float
    warmup: float
    min_lr: float
    weight_decay: float
    clip_norm: float
    seed: int


@dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch of a step: `share` is 1 / supervised tokens of the whole step, `parts` its micro-batches."""

    rows: np.ndarray
    share: float
    parts: int
    last: bool


def make_optimizer(model: torch.nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that train; biases and norms are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PipelineError("no parameter trains", remedy="set train", code=USAGE)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def plan_work(table: TokenTable, schedule: Schedule, epoch: int) -> Iterator[Work]:
    """The micro-batches of an epoch, in order."""
    steps = plan_epoch(table.lengths, batch_size=schedule.batch_size, seed=schedule.seed, epoch=epoch)
    for rows in steps:
        parts = split_by_tokens(rows, table.lengths, schedule.micro_tokens)
        share = 1.0 / int(table.supervised[rows].sum())
        for number, part in enumerate(parts, start=1):
            yield Work(part, share, len(parts), number == len(parts))


def run_ahead(jobs: Iterable[Job], make: Callable[[Job], Made], depth: int = 2) -> Iterator[tuple[Job, Made]]:
    """Each job with what `make` gives for it, made `depth` jobs ahead in one thread, in order."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Job, Future[Made]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, pool.submit(make, job)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def train(
    model: VisionLanguageModel,
    table: TokenTable,
    source: FeatureSource,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    image_id: int,
    name: str,
) -> list[dict[str, float]]:
    """Train in place; returns the history, a row a step: step, epoch, loss (per supervised token), lr, grad_norm, tokens.

    Raises `PipelineError` before the update that a non-finite loss or gradient would spoil.
    """
    steps_per_epoch = -(-len(table) // schedule.batch_size)
    steps = steps_per_epoch * schedule.epochs
    optimizer = make_optimizer(model, lr=schedule.lr, weight_decay=schedule.weight_decay)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, max(1, round(schedule.warmup * steps)), steps, min_lr_rate=schedule.min_lr
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    meter = _Meter(steps, name, table, accelerator.device)

    def load(work: Work) -> tuple[Batch, Any]:
        batch = collate(table, work.rows, image_id=image_id, tokens=source.tokens)
        return batch, source.load(batch.slots)

    history: list[dict[str, float]] = []
    for epoch in range(schedule.epochs):
        total = torch.zeros((), device=accelerator.device)
        for work, (batch, loaded) in meter.waiting(run_ahead(plan_work(table, schedule, epoch), load)):
            batch = batch.to(accelerator.device)
            loss, router = wrapped(batch, source.features(loaded).to(accelerator.device, non_blocking=True))
            accelerator.backward(loss * work.share + router / work.parts)
            total += loss.detach() * work.share
            meter.count(batch.ids.numel(), work.rows)
            if not work.last:
                continue
            norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], schedule.clip_norm)
            _require_finite(
                total, norm, len(history), schedule, table.where(int(work.rows[0])), scaled=accelerator.scaler is not None
            )
            row = {
                "step": len(history),
                "epoch": epoch,
                "loss": float(total),
                "lr": scheduler.get_last_lr()[0],
                "grad_norm": float(norm),
            }
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            history.append(row)
            meter.show(row)
            total.zero_()
    meter.close()
    accelerator.free_memory()
    return history


def _require_finite(loss: torch.Tensor, norm: torch.Tensor, step: int, schedule: Schedule, where: str, *, scaled: bool) -> None:
    if torch.isfinite(loss) and (scaled or torch.isfinite(norm)):  # a gradient scaler skips overflowing steps itself
        return
    raise PipelineError(
        f"loss {float(loss):g}, gradient norm {float(norm):g} at step {step} (lr {schedule.lr:g})",
        where=f"batch with {where}",
        remedy="lower lr or set precision: float32",
        code=NUMERIC,
    )


class _Meter:
    """One progress line: loss, lr, tokens/s, padding share, share of the time spent waiting for data, memory."""

    def __init__(self, steps: int, name: str, table: TokenTable, device: torch.device) -> None:
        self._bar = tqdm(total=steps, desc=name, unit="step", mininterval=0.5)
        self._table, self._device = table, device
        self._began, self._waited, self._padded, self._real = time.perf_counter(), 0.0, 0, 0

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def count(self, padded: int, rows: np.ndarray) -> None:
        self._padded += padded
        self._real += int(self._table.lengths[rows].sum())

    def show(self, row: dict[str, float]) -> None:
        spent = time.perf_counter() - self._began
        self._bar.set_postfix(
            loss=f"{row['loss']:.4f}",
            lr=f"{row['lr']:.1e}",
            tokens=f"{self._real / spent:,.0f}/s",
            padding=f"{1 - self._real / self._padded:.0%}",
            wait=f"{self._waited / spent:.0%}",
            mem=f"{peak_memory_gb(self._device):.1f}GB",
            refresh=False,
        )
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
