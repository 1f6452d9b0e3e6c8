"""One training loop for both training stages: it knows what trains and where patch features come from, nothing else.

accelerate owns the device, mixed precision and scaling. The loss of a step is the sum over its supervised tokens divided
by their number, however the step is cut into micro-batches, so accumulating changes nothing but rounding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from pipeline.batches import Batch
from pipeline.compiling import compiled_layers
from pipeline.dividing import divide, put_away, sync_gradients, whole
from pipeline.errors import NUMERIC, USAGE, PipelineError
from pipeline.heldout import Heldout
from pipeline.keeper import Keeper
from pipeline.meter import Meter
from pipeline.model import VisionLanguageModel
from pipeline.norms import lean_norms
from pipeline.packing import row_budget
from pipeline.planning import Planned, Schedule, Work
from pipeline.sharing import Sharing, alone
from pipeline.sources import FeatureSource
from pipeline.tokens import TokenTable
from pipeline.watch import Step

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


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
    keeper: Keeper | None = None,
    heldout: Heldout | None = None,
    watch: Step | None = None,
    threads: int = 1,
    divided: bool = False,
    packed: bool = False,
    compiled: bool = False,
) -> list[dict[str, float]]:
    """Train in place; returns the history, a row a step: step, epoch, loss (per supervised token), lr, grad_norm.

    `keeper` saves the state now and then and brings an interrupted run back; without one a run starts at its beginning.
    `heldout` measures on the way. `watch` is called with each step's figures. `threads` load ahead. Several processes
    (accelerate) divide each step between them; the history is the same in all. `divided`: each holds a part of every weight
    (see `pipeline.dividing`) and the model stays so. `packed`: see `pipeline.packing`, whose attention the model must use.
    `compiled`: see `pipeline.compiling`.
    Raises `PipelineError` before the update that a non-finite loss or gradient would spoil, and when told to stop.
    """
    if packed:
        schedule = replace(schedule, micro_tokens=row_budget(table.lengths, schedule.batch_size, schedule.micro_tokens))
    planned = Planned(table, source, schedule, sharing or alone(table.lengths), image_id, threads, divided, packed)
    run = _Run(model, schedule, accelerator, planned.steps, keeper, divided=divided)
    history, meter = run.history, Meter(planned.steps, len(run.history), name, accelerator)
    with _ended(run, meter, keeper, compiled=compiled):
        for epoch in range(len(history) // planned.steps_per_epoch, schedule.epochs):
            run.begin_step()
            for (work, batch), features in source.stream(meter.waiting(planned.load(epoch, len(history), accelerator))):
                run.backward(work, batch, features)
                meter.count(batch)
                if not work.last:
                    continue
                history.append(run.update(epoch, table.where(int(work.units[0][0]))))
                meter.show(history[-1])
                if watch:
                    watch(history[-1])
                last = len(history) == planned.steps
                if heldout and heldout.is_due(len(history), last=last):
                    with meter.paused():
                        run.measure(heldout)
                run.begin_step()
                if keeper:
                    keeper.after_step(model, run.optimizer, history, accelerator, last=last)
    accelerator.free_memory()
    return history


@contextmanager
def _ended(run: "_Run", meter: Meter, keeper: Keeper | None, *, compiled: bool) -> Iterator[None]:
    """Within, the model computes as training wants it; afterwards, however it ends, it is the caller's again."""
    with ExitStack() as done:
        done.callback(meter.close)
        if keeper:
            done.callback(keeper.release)
        done.callback(run.unwrap)
        done.enter_context(compiled_layers(run.model, compiled))
        done.enter_context(lean_norms(run.model.language_model, run.accelerator.device.type == "cpu"))
        yield


class _Run:
    """What a run has at hand and what is done in a step: micro-batches backward, an update, now and then a measurement."""

    def __init__(
        self,
        model: VisionLanguageModel,
        schedule: Schedule,
        accelerator: Accelerator,
        steps: int,
        keeper: Keeper | None,
        *,
        divided: bool,
    ) -> None:
        self.model, self._schedule, self.accelerator, self._divided = model, schedule, accelerator, divided
        if divided:
            divide(model)
        optimizer = make_optimizer(model, lr=schedule.lr, weight_decay=schedule.weight_decay)
        self.history = keeper.start(model, optimizer, accelerator.scaler) if keeper else []
        self._scheduler = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            optimizer,
            max(1, round(schedule.warmup * steps)),
            steps,
            last_epoch=len(self.history) - 1,
            min_lr_rate=schedule.min_lr,
        )
        self._wrapped: Any = model
        if divided:
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self._wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self._wrapped.train()
        self._total = torch.zeros((), device=accelerator.device)

    def begin_step(self) -> None:
        self._total = torch.zeros_like(self._total)
        torch.manual_seed(self._schedule.seed + len(self.history))  # dropout, where a model has any, follows from the step

    def backward(self, work: Work, batch: Batch, features: torch.Tensor) -> None:
        accelerator = self.accelerator
        batch, features = batch.to(accelerator.device), features.to(accelerator.device, non_blocking=True)
        if self._divided:
            sync_gradients(self.model, work.last)
        with nullcontext() if self._divided or work.last else accelerator.no_sync(self._wrapped):
            with accelerator.autocast():
                loss, router = self._wrapped(batch, features)
            # gradients are averaged over processes, the loss is a sum over all of them
            accelerator.backward(loss * (work.share * accelerator.num_processes) + router / work.parts)
        self._total += loss.detach() * work.share

    def update(self, epoch: int, where: str) -> dict[str, float]:
        total, schedule, step = self.accelerator.reduce(self._total, "sum"), self._schedule, len(self.history)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = whole(self.accelerator.clip_grad_norm_(trained, schedule.clip_norm))
        _require_finite(total, norm, step, schedule, where, scaled=self.accelerator.scaler is not None)
        lr = self._scheduler.get_last_lr()[0]
        self.optimizer.step()
        self._scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"step": step, "epoch": epoch, "loss": float(total), "lr": lr, "grad_norm": float(norm)}

    def measure(self, heldout: Heldout) -> None:
        heldout.measure(self.model, len(self.history) - 1, show=self.accelerator.is_main_process)
        if self._divided:
            put_away(self.model)
        self._wrapped.train()

    def unwrap(self) -> None:
        """Take off what accelerate put around the model: a later forward pass is autocast only where its caller says so."""
        if not self._divided and "_original_forward" in self.model.__dict__:
            self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
            del self.model.forward  # the class's own, bound to this model, which a copy of it would carry along


def _require_finite(loss: torch.Tensor, norm: torch.Tensor, step: int, schedule: Schedule, where: str, *, scaled: bool) -> None:
    if torch.isfinite(loss) and (scaled or torch.isfinite(norm)):  # a gradient scaler skips overflowing steps itself
        return
    raise PipelineError(
        f"loss {float(loss):g}, gradient norm {float(norm):g} at step {step} (lr {schedule.lr:g})",
        where=f"batch with {where}",
        remedy="lower lr or set precision: float32",
        code=NUMERIC,
    )
