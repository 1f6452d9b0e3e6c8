"""What a step changes the weights with: AdamW, its learning rate's schedule, and a stop before a step that is no number."""

import math

import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from pipeline.core import NUMERIC, USAGE, PipelineError
from pipeline.vlm.batches import Schedule


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


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, *, steps: int, done: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine down to `schedule.min_lr` of the rate over `steps`, of which `done` are made."""
    warmup = max(1, round(schedule.warmup * steps))
    return get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, warmup, steps, last_epoch=done - 1, min_lr_rate=schedule.min_lr
    )


def require_finite(loss: float, norm: float, step: int, schedule: Schedule, where: str, *, scaled: bool, saved: str = "") -> None:
    """Raises `PipelineError` naming the batch for a loss or gradient norm that is not finite.

    `scaled`: a gradient scaler is at work, which skips overflowing steps itself. `saved`: which state there is to fall back on.
    """
    if math.isfinite(loss) and (scaled or math.isfinite(norm)):
        return
    raise PipelineError(
        f"loss {loss:g}, gradient norm {norm:g} at step {step} (lr {schedule.lr:g})",
        where=f"batch with {where}",
        remedy="lower lr or set precision: float32" + (f"; {saved}" if saved else ""),
        code=NUMERIC,
    )
