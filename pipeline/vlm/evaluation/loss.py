"""Held-out loss: the mean cross-entropy a supervised token of rows that were never trained on."""

from contextlib import closing

import numpy as np
import torch
from accelerate import Accelerator
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
    model.eval()
    sharing, rank, ranks = examples.sharing, accelerator.process_index, accelerator.num_processes
    rows = np.arange(len(examples.table))
    parts = split_by_tokens(rows, sharing, micro_tokens, rank=rank, ranks=ranks)
    counted = len(parts)
    if even:
        most = max(len(split_by_tokens(rows, sharing, micro_tokens, rank=number, ranks=ranks)) for number in range(ranks))
        parts += [[rows[:1]]] * (most - counted)
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    hidden = not accelerator.is_main_process
    with closing(prefetch(parts, examples.load)) as ahead:
        loaded = examples.source.stream(made for _, made in ahead)
        bar = tqdm(loaded, total=len(parts), desc="held-out loss", unit="batch", mininterval=0.5, disable=hidden)
        for number, (batch, features) in enumerate(bar):
            with accelerator.autocast():
                loss, _ = model(batch.to(accelerator.device), features.to(accelerator.device))
            if number < counted:
                total += loss.double()  # added up on the device, which nothing waits for
    return float(accelerator.reduce(total, "sum")) / int(examples.table.supervised.sum())
