"""One training loop for both training stages: it knows what trains and where patch features come from, nothing else.

accelerate owns the device, mixed precision and scaling. The loss of a step is the sum over its supervised tokens divided
by their number, however the step is cut into micro-batches, so accumulating changes nothing but rounding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from pipeline.ahead import run_ahead
from pipeline.batches import Batch, collate, pack_by_tokens, plan_epoch, split_by_tokens
from pipeline.compiling import compiled_layers
from pipeline.dividing import divide, put_away, sync_gradients, whole
from pipeline.errors import NUMERIC, USAGE, PipelineError
from pipeline.heldout import Heldout
from pipeline.keeper import Keeper
from pipeline.meter import Meter
from pipeline.model import VisionLanguageModel
from pipeline.norms import lean_norms
from pipeline.packing import row_budget
from pipeline.sharing import Sharing, alone
from pipeline.sources import FeatureSource
from pipeline.tokens import TokenTable
from pipeline.watch import Step

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
    packed: bool = False,
) -> Iterator[Work]:
    """The micro-batches of an epoch that fall to one of `ranks` processes, in order, from the epoch's step `skip` on.

    `even`: every process gets as many; where one has less to do, the rest of its pieces do not count. `packed`: units of a
    micro-batch will stand end to end in one row. It decides which go together in a pass, not which make a step.
    """
    split = pack_by_tokens if packed else split_by_tokens
    sharing = sharing or alone(table.lengths)
    shared = sharing if sharing.rows_a_group > 1 else None
    steps = plan_epoch(table.lengths, batch_size=schedule.batch_size, seed=schedule.seed, epoch=epoch, sharing=shared)
    for rows in steps[skip:]:
        every = [split(rows, sharing, schedule.micro_tokens, rank=number, ranks=ranks) for number in range(ranks)]
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
    steps_per_epoch = -(-len(table) // schedule.batch_size)
    steps = steps_per_epoch * schedule.epochs
    if packed:
        budget = row_budget(table.lengths, schedule.batch_size, schedule.micro_tokens)
        schedule = replace(schedule, micro_tokens=budget)
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
    meter = Meter(steps, len(history), name, accelerator)

    def load(epoch: int) -> Iterator[tuple[tuple[Work, Batch], Any]]:
        skip = len(history) - epoch * steps_per_epoch
        ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
        planned = plan_work(table, schedule, epoch, sharing=sharing, skip=skip, even=divided, packed=packed, **ranks)
        pack = schedule.micro_tokens if packed else 0
        return _load_ahead(planned, table, source, sharing=sharing, image_id=image_id, pack=pack, threads=threads)

    def backward(work: Work, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        batch, features = batch.to(accelerator.device), features.to(accelerator.device, non_blocking=True)
        if divided:
            sync_gradients(model, work.last)
        with nullcontext() if divided or work.last else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                loss, router = wrapped(batch, features)
            # gradients are averaged over processes, the loss is a sum over all of them
            accelerator.backward(loss * (work.share * accelerator.num_processes) + router / work.parts)
        return loss.detach() * work.share

    def update(total: torch.Tensor, epoch: int, first: int) -> dict[str, float]:
        total = accelerator.reduce(total, "sum")
        norm = whole(accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], schedule.clip_norm))
        _require_finite(total, norm, len(history), schedule, table.where(first), scaled=accelerator.scaler is not None)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return {"step": len(history), "epoch": epoch, "loss": float(total), "lr": lr, "grad_norm": float(norm)}

    def measure(heldout: Heldout) -> None:
        with meter.paused():
            heldout.measure(model, len(history) - 1, show=accelerator.is_main_process)
        if divided:
            put_away(model)
        wrapped.train()

    done = ExitStack()
    done.callback(meter.close)
    if keeper:
        done.callback(keeper.release)
    if not divided:
        done.callback(_unwrap, model, wrapped, accelerator)
    done.enter_context(compiled_layers(model, compiled))
    done.enter_context(lean_norms(model.language_model, accelerator.device.type == "cpu"))
    with done:
        for epoch in range(len(history) // steps_per_epoch, schedule.epochs):
            total = torch.zeros((), device=accelerator.device)
            torch.manual_seed(schedule.seed + len(history))  # dropout, where a model has any, follows from the step
            for (work, batch), features in source.stream(meter.waiting(load(epoch))):
                total += backward(work, batch, features)
                meter.count(batch)
                if not work.last:
                    continue
                history.append(update(total, epoch, int(work.units[0][0])))
                meter.show(history[-1])
                if watch:
                    watch(history[-1])
                last = len(history) == steps
                if heldout and heldout.is_due(len(history), last=last):
                    measure(heldout)
                total = torch.zeros_like(total)
                torch.manual_seed(schedule.seed + len(history))
                if keeper:
                    keeper.after_step(model, optimizer, history, accelerator, last=last)
    accelerator.free_memory()
    return history


def _load_ahead(
    planned: Iterator[Work],
    table: TokenTable,
    source: FeatureSource,
    *,
    sharing: Sharing,
    image_id: int,
    pack: int,
    threads: int,
) -> Iterator[tuple[tuple[Work, Batch], Any]]:
    """Each micro-batch's work, its tensors, and what its features need, made ahead in threads."""

    def prepare(work: Work) -> Batch:
        batch = collate(table, work.units, sharing=sharing, image_id=image_id, tokens=source.tokens, pack=pack)
        source.announce(batch.slots)
        return batch

    def load(prepared: tuple[Work, Batch]) -> Any:
        return source.load(prepared[1].slots)

    return run_ahead(run_ahead(planned, prepare, depth=threads + 1), load, depth=threads, threads=threads)


def _unwrap(model: VisionLanguageModel, wrapped: torch.nn.Module, accelerator: Accelerator) -> None:
    """Take off what accelerate put around the model: a later forward pass is autocast only where its caller says so."""
    if "_original_forward" in model.__dict__:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        del model.forward  # the class's own, bound to this model, which a copy of it would carry along


def _require_finite(loss: torch.Tensor, norm: torch.Tensor, step: int, schedule: Schedule, where: str, *, scaled: bool) -> None:
    if torch.isfinite(loss) and (scaled or torch.isfinite(norm)):  # a gradient scaler skips overflowing steps itself
        return
    raise PipelineError(
        f"loss {float(loss):g}, gradient norm {float(norm):g} at step {step} (lr {schedule.lr:g})",
        where=f"batch with {where}",
        remedy="lower lr or set precision: float32",
        code=NUMERIC,
    )
