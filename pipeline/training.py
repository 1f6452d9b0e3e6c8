"""One training loop for both training stages: it knows what trains and where patch features come from, nothing else.

accelerate owns the device, mixed precision and scaling. The loss of a step is the sum over its supervised tokens divided
by their number, however the step is cut into micro-batches, so accumulating changes nothing but rounding.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from pipeline.ahead import run_ahead
from pipeline.batches import Batch, collate, plan_epoch, split_by_tokens
from pipeline.dividing import divide, sync_gradients, whole
from pipeline.errors import INTERRUPTED, NUMERIC, USAGE, PipelineError
from pipeline.hardware import peak_memory_gb
from pipeline.model import VisionLanguageModel
from pipeline.resume import Resume
from pipeline.sharing import Sharing, alone
from pipeline.sources import FeatureSource
from pipeline.tokens import TokenTable
from pipeline.watch import Step

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
    """One micro-batch of a step, as this process does it.

    Attributes:
        units: rows, those that share a beginning together (see `pipeline.sharing`).
        share: 1 / supervised tokens of the whole step, of all processes; 0 where a step has too few units for all.
        parts: this process's micro-batches of the step; `last` of them closes it.
    """

    units: list[np.ndarray]
    share: float
    parts: int
    last: bool


def make_optimizer(model: torch.nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that train; biases and norms are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise PipelineError("no parameter trains", remedy="set train", code=USAGE)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay, "initial_lr": lr},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "initial_lr": lr},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def plan_work(
    table: TokenTable,
    schedule: Schedule,
    epoch: int,
    *,
    sharing: Sharing | None = None,
    skip: int = 0,
    rank: int = 0,
    ranks: int = 1,
    even: bool = False,
) -> Iterator[Work]:
    """The micro-batches of an epoch that fall to one of `ranks` processes, in order, from the epoch's step `skip` on.

    `even`: every process gets as many; where one has less to do, the rest of its pieces do not count.
    """
    sharing = sharing or alone(table.lengths)
    shared = sharing if sharing.rows_a_group > 1 else None
    steps = plan_epoch(table.lengths, batch_size=schedule.batch_size, seed=schedule.seed, epoch=epoch, sharing=shared)
    for rows in steps[skip:]:
        every = [split_by_tokens(rows, sharing, schedule.micro_tokens, rank=number, ranks=ranks) for number in range(ranks)]
        parts, share = every[rank], 1.0 / int(table.supervised[rows].sum())
        count = max(map(len, every)) if even else max(1, len(parts))  # every process takes part in every step
        for number in range(count):
            counts = number < len(parts)
            yield Work(parts[number] if counts else [rows[:1]], share if counts else 0.0, count, number == count - 1)


def train(
    model: VisionLanguageModel,
    table: TokenTable,
    source: FeatureSource,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    image_id: int,
    name: str,
    sharing: Sharing | None = None,
    keeper: "Keeper | None" = None,
    watch: Step | None = None,
    threads: int = 1,
    divided: bool = False,
) -> list[dict[str, float]]:
    """Train in place; returns the history, a row a step: step, epoch, loss (per supervised token), lr, grad_norm.

    `keeper` saves the state now and then and brings an interrupted run back; without one a run starts at its beginning.
    `watch` is called with each step's figures. `threads` load ahead. Several processes (accelerate) divide each step
    between them; the history is the same in all. `divided`: each holds a part of every weight (see `pipeline.dividing`)
    and the model stays so.
    Raises `PipelineError` before the update that a non-finite loss or gradient would spoil, and when told to stop.
    """
    steps_per_epoch = -(-len(table) // schedule.batch_size)
    steps = steps_per_epoch * schedule.epochs
    if divided:
        divide(model)
    optimizer = make_optimizer(model, lr=schedule.lr, weight_decay=schedule.weight_decay)
    history = keeper.start(model, optimizer, accelerator.scaler) if keeper else []
    scheduler = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, max(1, round(schedule.warmup * steps)), steps, last_epoch=len(history) - 1, min_lr_rate=schedule.min_lr
    )
    wrapped, optimizer = (model, accelerator.prepare(optimizer)) if divided else accelerator.prepare(model, optimizer)
    wrapped.train()
    sharing = sharing or alone(table.lengths)
    ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    meter = _Meter(steps, len(history), name, accelerator)

    def prepare(work: Work) -> Batch:
        batch = collate(table, work.units, sharing=sharing, image_id=image_id, tokens=source.tokens)
        source.announce(batch.slots)
        return batch

    def load(prepared: tuple[Work, Batch]) -> Any:
        return source.load(prepared[1].slots)

    for epoch in range(len(history) // steps_per_epoch, schedule.epochs):
        total = torch.zeros((), device=accelerator.device)
        planned = plan_work(
            table, schedule, epoch, sharing=sharing, skip=len(history) - epoch * steps_per_epoch, even=divided, **ranks
        )
        torch.manual_seed(schedule.seed + len(history))  # dropout, where a model has any, follows from the step
        batches = run_ahead(run_ahead(planned, prepare, depth=threads + 1), load, depth=threads + 1, threads=threads)
        for (work, batch), loaded in meter.waiting(batches):
            batch = batch.to(accelerator.device)
            features = source.features(loaded).to(accelerator.device, non_blocking=True)
            if divided:
                sync_gradients(model, work.last)
            with nullcontext() if divided or work.last else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    loss, router = wrapped(batch, features)
                # gradients are averaged over processes, the loss is a sum over all of them
                accelerator.backward(loss * (work.share * accelerator.num_processes) + router / work.parts)
            total += loss.detach() * work.share
            meter.count(batch)
            if not work.last:
                continue
            total = accelerator.reduce(total, "sum")
            norm = whole(accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], schedule.clip_norm))
            _require_finite(
                total, norm, len(history), schedule, table.where(int(work.units[0][0])), scaled=accelerator.scaler is not None
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
            if watch:
                watch(row)
            total = torch.zeros_like(total)
            torch.manual_seed(schedule.seed + len(history))
            if keeper:
                keeper.after_step(model, optimizer, history, accelerator, last=len(history) == steps)
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


class Keeper:
    """Saves the state every so many minutes, at the end, and when a signal asks the run to stop."""

    def __init__(self, resume: Resume, *, minutes: float) -> None:
        self._resume, self._seconds = resume, 60 * minutes
        self._saved, self._stop = time.monotonic(), False
        self._asked: float | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, _frame: object) -> None:
        """The first signal asks; a second one ends at once, but not one of the several that a dying parent's threads send."""
        if self._asked is None:
            self._stop, self._asked = True, time.monotonic()
        elif time.monotonic() - self._asked > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def start(self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, scaler: Any) -> list[dict[str, float]]:
        """The history of the state that was brought back, empty for a fresh run."""
        history = self._resume.load(model, optimizer, scaler)
        if history and os.environ.get("RANK", "0") == "0":
            print(f"resume: going on after step {len(history)}", flush=True)
        return history

    def after_step(
        self,
        model: VisionLanguageModel,
        optimizer: Any,
        history: list[dict[str, float]],
        accelerator: Accelerator,
        *,
        last: bool,
    ) -> None:
        """Save when it is time; raises `PipelineError` when the run was asked to stop. All processes decide alike."""
        due = time.monotonic() - self._saved >= self._seconds
        if accelerator.num_processes > 1:
            asked = torch.tensor([due, self._stop], dtype=torch.float32, device=accelerator.device)
            due, self._stop = (bool(flag) for flag in accelerator.reduce(asked, "sum"))
        if not (last or self._stop or due):
            return
        self._resume.save(
            model, getattr(optimizer, "optimizer", optimizer), history, accelerator.scaler, write=accelerator.is_main_process
        )
        self._saved = time.monotonic()
        if self._stop and not last:
            raise PipelineError(
                f"stopped after step {len(history)}, state saved", remedy="the same command goes on", code=INTERRUPTED
            )


class _Meter:
    """One progress line: loss, lr, tokens/s, padding share, share of the time spent waiting for data, memory."""

    def __init__(self, steps: int, done: int, name: str, accelerator: Accelerator) -> None:
        hidden = not accelerator.is_main_process
        self._bar = tqdm(total=steps, initial=done, desc=name, unit="step", mininterval=0.5, disable=hidden)
        self._device = accelerator.device
        self._began, self._waited, self._padded, self._real, self._images = time.perf_counter(), 0.0, 0, 0, 0

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def count(self, batch: Batch) -> None:
        self._padded += batch.ids.numel()
        self._real += batch.tokens
        self._images += len(batch.slots)

    def show(self, row: dict[str, float]) -> None:
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
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
