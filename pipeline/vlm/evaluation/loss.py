"""Held-out loss: the mean cross-entropy a supervised token of rows that were never trained on."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from pipeline.core import prefetch
from pipeline.vlm.batches import Examples, split_by_tokens
from pipeline.vlm.model import VisionLanguageModel


@torch.no_grad()  # not inference mode: a model that goes on training afterwards must not keep a tensor of it
def heldout_loss(
    model: VisionLanguageModel, examples: Examples, accelerator: Accelerator, *, micro_tokens: int, even: bool = False
) -> float:
    """Mean cross-entropy a supervised token over all rows; several processes (accelerate) divide them.

    `even`: all make as many forward passes, as a sharded model needs; those of a process with less to do do not count.
    """
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for _, loss in _losses(model, examples, accelerator, micro_tokens=micro_tokens, even=even, each=False):
        total += loss.double()  # added up on the device, which nothing waits for
    return float(accelerator.reduce(total, "sum")) / int(examples.table.supervised.sum())


@torch.no_grad()
def log_likelihoods(
    model: VisionLanguageModel, examples: Examples, accelerator: Accelerator, *, micro_tokens: int
) -> tuple[float, list[np.ndarray]]:
    """The held-out loss, and the log-likelihood of each supervised token: float32 [tokens] for every row of the table."""
    mine: dict[int, np.ndarray] = {}
    for units, losses in _losses(model, examples, accelerator, micro_tokens=micro_tokens, even=False, each=True):
        rows = np.concatenate(units)  # labels stand in the order of their rows
        ends = np.cumsum(examples.table.supervised[rows])[:-1]
        mine |= dict(zip(rows.tolist(), np.split(-losses.float().cpu().numpy(), ends), strict=True))
    everyone = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    found = {row: values for part in everyone for row, values in part.items()}
    of_rows = [found[row] for row in range(len(examples.table))]
    return float(-sum(values.sum(dtype=np.float64) for values in of_rows)) / int(examples.table.supervised.sum()), of_rows


def _losses(
    model: VisionLanguageModel, examples: Examples, accelerator: Accelerator, *, micro_tokens: int, even: bool, each: bool
) -> Iterator[tuple[list[np.ndarray], torch.Tensor]]:
    """The units of each of this process's batches, and their loss on its device."""
    model.eval()
    sharing, rank, ranks = examples.sharing, accelerator.process_index, accelerator.num_processes
    rows = np.arange(len(examples.table))
    parts = split_by_tokens(rows, sharing, micro_tokens, rank=rank, ranks=ranks)
    counted = len(parts)
    if even:
        most = max(len(split_by_tokens(rows, sharing, micro_tokens, rank=number, ranks=ranks)) for number in range(ranks))
        parts += [[rows[:1]]] * (most - counted)
    hidden = not accelerator.is_main_process
    with closing(prefetch(parts, examples.load)) as ahead:
        loaded = examples.source.stream(made for _, made in ahead)
        bar = tqdm(loaded, total=len(parts), desc="held-out loss", unit="batch", mininterval=0.5, disable=hidden)
        for number, (batch, features) in enumerate(bar):
            with accelerator.autocast():
                loss, _ = model(batch.to(accelerator.device), features.to(accelerator.device), each=each)
            if number < counted:
                yield parts[number], loss
