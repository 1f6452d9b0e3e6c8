"""One training loop for both training stages. What trains is set on the model before (`freeze`), and where patch features come
from is the examples' feature source: the store or the live encoder. Here the two streams meet, once a micro-batch.
The stored source goes from an image's slot to its hash to its row of the store, and gives float16 [S, P, Dv].

accelerate owns the device, mixed precision and scaling. The loss of a step is the sum over its supervised tokens divided
by their number, however the step is cut into micro-batches, so accumulating changes nothing but rounding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.vlm.batches import Batch, BatchLoader, Examples, Execution, MicroBatch, Schedule, row_budget
from pipeline.vlm.evaluation import Heldout
from pipeline.vlm.model import (
    VisionLanguageModel,
    compiled_layers,
    decoder_layers,
    full_tensor,
    reshard,
    shard_model,
    sync_gradients,
)
from pipeline.vlm.training.alike import require_alike
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.optimizer import make_optimizer, make_scheduler, require_finite
from pipeline.vlm.training.progress import Progress

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def train(
    model: VisionLanguageModel,
    examples: Examples,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    callbacks: Callbacks = Callbacks(),  # noqa: B008
) -> list[dict[str, float]]:
    """Train in place; returns the history, a row a step: step, epoch, loss (per supervised token), lr, grad_norm, and
    router_loss (the mean over micro-batches, weighed as it is trained) where a mixture's router trains.

    Several processes (accelerate) divide each step between them; the history is the same in all. A model that is sharded
    stays so. Raises `PipelineError` before the update that a non-finite loss or gradient would spoil, and when told to stop.
    """
    if execution.packed:
        budget = row_budget(examples.table.lengths, schedule.batch_size, schedule.micro_tokens)
        schedule = replace(schedule, micro_tokens=budget)
    loader = BatchLoader(examples, schedule, execution)
    steps = _Steps(model, schedule, accelerator, loader.steps, callbacks, sharded=execution.sharded)
    progress = Progress(loader.steps, len(steps.history), execution.name, accelerator)
    with _ended(steps, progress, compiled=execution.compiled):
        for epoch in range(len(steps.history) // loader.steps_per_epoch, schedule.epochs):
            steps.begin()
            with closing(loader.load(epoch, len(steps.history), accelerator)) as loaded:
                for (micro, batch), features in examples.source.stream(progress.waiting(loaded)):
                    steps.backward(micro, batch, features)
                    progress.count(batch)
                    if micro.last:
                        steps.update(epoch, examples.table.where(int(micro.units[0][0])))
                        progress.show(steps.history[-1])
                        steps.call_back(callbacks, progress, last=len(steps.history) == loader.steps)
                        steps.begin()
    return steps.history


@contextmanager
def _ended(steps: "_Steps", progress: Progress, *, compiled: bool) -> Iterator[None]:
    """Within, the model computes as training wants it; afterwards, however it ends, it is the caller's again."""
    with ExitStack() as done:
        done.callback(steps.accelerator.free_memory)  # or it would hold a model whose run has failed
        done.callback(progress.close)
        if steps.checkpointer:
            done.callback(steps.checkpointer.release)
        done.callback(steps.unwrap)
        done.enter_context(compiled_layers(steps.model, compiled))
        yield


class _Steps:
    """The steps of a run: micro-batches backward, an update, and what is called after it. `history` has a row a step."""

    def __init__(
        self,
        model: VisionLanguageModel,
        schedule: Schedule,
        accelerator: Accelerator,
        steps: int,
        callbacks: Callbacks,
        *,
        sharded: bool,
    ) -> None:
        self.model, self._schedule, self.accelerator, self._sharded = model, schedule, accelerator, sharded
        if sharded:
            shard_model(model, decoder_layers(model.language_model))
        optimizer = make_optimizer(model, lr=schedule.lr, weight_decay=schedule.weight_decay)
        self.checkpointer = callbacks.checkpointer
        self.history = self.checkpointer.start(model, optimizer, accelerator.scaler) if self.checkpointer else []
        require_alike(accelerator, {"steps made": len(self.history)})
        self._scheduler = make_scheduler(optimizer, schedule, steps=steps, done=len(self.history))
        self._wrapped: Any = model
        if sharded:
            self._optimizer = accelerator.prepare(optimizer)
        else:
            self._wrapped, self._optimizer = accelerator.prepare(model, optimizer)
        self._wrapped.train()
        self._total = torch.zeros(2, device=accelerator.device)  # the loss, and a router's

    def begin(self) -> None:
        """A step begins."""
        self._total = torch.zeros_like(self._total)
        torch.manual_seed(self._schedule.seed + len(self.history))  # dropout, where a model has any, follows from the step

    def backward(self, micro: MicroBatch, batch: Batch, features: torch.Tensor) -> None:
        """Add a micro-batch's gradients and loss to the step's: token ids in `batch`, its images' features [S, P, Dv]."""
        accelerator = self.accelerator
        batch, features = batch.to(accelerator.device), features.to(accelerator.device, non_blocking=True)
        if self._sharded:
            sync_gradients(self.model, micro.last)
        with nullcontext() if self._sharded or micro.last else accelerator.no_sync(self._wrapped):
            with accelerator.autocast():
                loss, router = self._wrapped(batch, features)
            # weight: 1 / supervised tokens of the step; gradients are averaged over processes, the loss is a sum over all of them
            accelerator.backward(loss * (micro.weight * accelerator.num_processes) + router / micro.parts)
        self._total += torch.stack([loss.detach() * micro.weight, router.detach() / (micro.parts * accelerator.num_processes)])

    def update(self, epoch: int, where: str) -> None:
        """Change the weights and add the step's figures to the history; `where` names one of its rows."""
        total, schedule, step = self.accelerator.reduce(self._total, "sum"), self._schedule, len(self.history)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = full_tensor(self.accelerator.clip_grad_norm_(trained, schedule.clip_norm))
        loss, router, length = torch.cat([total, norm.to(total.dtype)[None]]).tolist()  # one wait for the device a step
        saved = self.checkpointer.last_good() if self.checkpointer else ""
        require_finite(loss, length, step, schedule, where, scaled=self.accelerator.scaler is not None, saved=saved)
        lr = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        row = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": length}
        self.history.append(row | ({"router_loss": router} if self.model.router_trains else {}))

    def call_back(self, callbacks: Callbacks, progress: Progress, *, last: bool) -> None:
        """After an update: figures out, held-out loss measured where it is due, the state saved where it is time."""
        if callbacks.on_step:
            callbacks.on_step(self.history[-1])
        if callbacks.heldout and callbacks.heldout.is_due(len(self.history), last=last):
            with progress.paused():
                self._measure(callbacks.heldout)
            if callbacks.log:
                callbacks.log({"heldout_loss": callbacks.heldout.rows[-1]["loss"]}, len(self.history) - 1)
        if self.checkpointer:
            self.checkpointer.after_step(self.model, self._optimizer, self.history, self.accelerator, last=last)

    def _measure(self, heldout: Heldout) -> None:
        heldout.measure(self.model, len(self.history) - 1, show=self.accelerator.is_main_process)
        if self._sharded:
            reshard(self.model)
        self._wrapped.train()

    def unwrap(self) -> None:
        """Take off what accelerate put around the model: a later forward pass is autocast only where its caller says so."""
        if not self._sharded and "_original_forward" in self.model.__dict__:
            self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
            del self.model.forward  # the class's own, bound to this model, which a copy of it would carry along
