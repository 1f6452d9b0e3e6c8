"""Held-out loss: the mean cross-entropy a supervised token of rows that were never trained on."""

import tempfile
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from pipeline.core import prefetch
from pipeline.vlm.batches import Examples, Sharing, split_by_tokens
from pipeline.vlm.evaluation.questions import row_windows
from pipeline.vlm.model import VisionLanguageModel


@torch.no_grad()  # not inference mode: a model that goes on training afterwards must not keep a tensor of it
def heldout_loss(
    model: VisionLanguageModel, examples: Examples, accelerator: Accelerator, *, micro_tokens: int, even: bool = False
) -> float:
    """Mean cross-entropy a supervised token over all rows; several processes (accelerate) divide them.

    `even`: all make as many forward passes, as a sharded model needs; those of a process with less to do do not count.
    """
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for _, _, loss in _losses(model, examples, accelerator, micro_tokens=micro_tokens, even=even, each=False):
        if loss is not None:
            total += loss.double()  # added up on the device, which nothing waits for
    return float(accelerator.reduce(total, "sum")) / int(examples.table.supervised.sum())


@torch.no_grad()
def log_likelihoods(
    model: VisionLanguageModel, examples: Examples, accelerator: Accelerator, *, micro_tokens: int
) -> tuple[float, np.ndarray]:
    """The held-out loss, and the log-likelihood of each supervised token: float32 [supervised tokens of the table], row by row.

    They lie in a temporary file that is mapped: a large set takes room on disk and not in memory.
    """
    supervised = examples.table.supervised
    firsts = np.concatenate([[0], np.cumsum(supervised)])
    found = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(max(1, int(firsts[-1])),))  # noqa: SIM115 (it holds the file)
    mine, total = dict[int, np.ndarray](), 0.0
    for window, units, losses in _losses(model, examples, accelerator, micro_tokens=micro_tokens, even=False, each=True):
        if units is not None and losses is not None:
            rows = np.concatenate(units)  # labels stand in the order of their rows
            mine |= dict(zip(rows.tolist(), np.split(-losses.float().cpu().numpy(), np.cumsum(supervised[rows])[:-1]), strict=True))
            continue
        for part in gather_object([mine]) if accelerator.num_processes > 1 else [mine]:
            for row, values in part.items():
                found[firsts[row] : firsts[row + 1]] = values
        total -= sum(found[firsts[row] : firsts[row + 1]].sum(dtype=np.float64) for row in window.tolist())
        mine = {}
    return float(total) / max(1, int(firsts[-1])), found[: firsts[-1]]


def _losses(
    model: VisionLanguageModel, examples: Examples, accelerator: Accelerator, *, micro_tokens: int, even: bool, each: bool
) -> Iterator[tuple[np.ndarray, list[np.ndarray] | None, torch.Tensor | None]]:
    """The rows of a window, the units of each of this process's batches of them and their loss on its device; at a window's
    end None for both.
    """
    model.eval()
    windows = list(row_windows(len(examples.table)))
    hidden = not accelerator.is_main_process
    with tqdm(total=len(examples.table), desc="held-out loss", unit="row", mininterval=0.5, disable=hidden) as bar:
        for window in windows:
            parts, counted = _parts(window, examples.sharing, micro_tokens, accelerator, even=even)
            with closing(prefetch(parts, examples.load)) as ahead:
                loaded = examples.source.stream(made for _, made in ahead)
                for number, (batch, features) in enumerate(loaded):
                    with accelerator.autocast():
                        loss, _ = model(batch.to(accelerator.device), features.to(accelerator.device), each=each)
                    if number < counted:
                        bar.update(sum(map(len, parts[number])) * accelerator.num_processes)
                        yield window, parts[number], loss
            yield window, None, None


def _parts(
    rows: np.ndarray, sharing: Sharing, micro_tokens: int, accelerator: Accelerator, *, even: bool
) -> tuple[list[list[np.ndarray]], int]:
    """This process's batches, and how many of them count."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    parts = split_by_tokens(rows, sharing, micro_tokens, rank=rank, ranks=ranks)
    counted = len(parts)
    if even:
        most = max(len(split_by_tokens(rows, sharing, micro_tokens, rank=number, ranks=ranks)) for number in range(ranks))
        parts += [[rows[:1]]] * (most - counted)
    return parts, counted
