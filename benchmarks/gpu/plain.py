"""The other side: a plain Transformers trainer that somebody has tuned, the kindest that a live vision tower can have it.

Pixels of all pictures lie decoded in pinned memory, batches are put together before the clock starts, rows of like length
go together and are padded to a few widths, tower and frozen weights are bfloat16, the rest is autocast, attention is torch's
fused one without a mask, logits are computed at supervised tokens only, the optimiser is fused, nothing makes the host wait,
and layers are compiled where a trial says that it is faster.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu.clock import Window, wait_for, weights_bytes
from benchmarks.gpu.encoder import Forward, PlainTower, own_code, set_compiled
from pipeline.features.decoding import DecodedImages, ImageFile, decoded_batches
from pipeline.features.encoder.preprocess import Preprocessor
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.batches.plan import plan_epoch

BUCKET = 16  # widths are multiples of it
TRIAL = 4  # steps by which eager and compiled are compared


def own_llm_code(plain: Forward) -> Forward:
    """As `own_code`, for layers of the language model."""

    def llm_layer(*args: Any, **options: Any) -> Any:
        return plain(*args, **options)

    return llm_layer


class PlainModel(nn.Module):
    """Tower, linear projector and language model in one class."""

    def __init__(self, tower: PlainTower, projector: nn.Module, llm: Any) -> None:
        super().__init__()
        self.tower, self.projector, self.llm = tower, projector, llm

    def set_compiled(self, on: bool, device: torch.device) -> None:
        """All layers, or none; those of the language model by the compiler's default, since rows have several widths."""
        set_compiled(self.tower.layers(), on, device, own=own_code, dynamic=False)
        set_compiled(list(self.llm.model.layers), on, device, own=own_llm_code, dynamic=None)

    def forward(self, batch: "PlainBatch", pixels: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy over supervised tokens: ids [B, T], pixels uint8 [B, 3, side, side]."""
        projected = self.projector(self.tower(pixels).to(next(self.projector.parameters()).dtype))  # [B, P, D]
        embeddings = self.llm.get_input_embeddings()(batch.ids)
        columns = batch.start[:, None] + torch.arange(projected.shape[1], device=projected.device)
        embeddings = embeddings.index_put((batch.row[:, None].expand_as(columns), columns), projected.to(embeddings.dtype))
        hidden = self.llm.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        kept = hidden.flatten(0, 1).index_select(0, batch.loss_positions)
        return F.cross_entropy(self.llm.lm_head(kept).float(), batch.labels, reduction="sum")


@dataclass(frozen=True, slots=True)
class PlainBatch:
    """A pass: ids int64 [B, T] padded to a bucket, the rest as the pipeline's own batch has it."""

    ids: torch.Tensor
    loss_positions: torch.Tensor
    labels: torch.Tensor
    row: torch.Tensor
    start: torch.Tensor

    def to(self, device: torch.device) -> "PlainBatch":
        return PlainBatch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class Work:
    """One pass of a step, in pinned memory, and what its summed loss counts; `last` closes the step."""

    batch: PlainBatch
    pixels: torch.Tensor
    weight: float
    last: bool


def make_batch(table: TokenTable, rows: np.ndarray, *, image_id: int, tokens: int) -> PlainBatch:
    """Rows padded to the next width; which tokens are supervised and where pictures stand is the table's."""
    made = collate(table, rows, image_id=image_id, tokens=tokens)
    more = -made.ids.shape[1] % BUCKET
    at, width = made.loss_positions, made.ids.shape[1]
    return PlainBatch(
        ids=F.pad(made.ids, (0, more)),
        loss_positions=at // width * (width + more) + at % width,
        labels=made.labels,
        row=made.slot_row,
        start=made.slot_start,
    )


def prepare(
    table: TokenTable, pixels: torch.Tensor, *, image_id: int, tokens: int, batch_size: int, pass_rows: int, pin: bool
) -> list[Work]:
    """An epoch over the rows whose pictures are at hand, every step cut into passes of at most `pass_rows` rows."""
    works = []
    for step in plan_epoch(table.lengths, batch_size=batch_size, seed=0, epoch=0):
        weight = 1 / float(table.supervised[step].sum())
        parts = [step[start : start + pass_rows] for start in range(0, len(step), pass_rows)]
        for part in parts:
            batch, shown = make_batch(table, part, image_id=image_id, tokens=tokens), pixels[part]
            if pin:
                batch = PlainBatch(*(getattr(batch, name).pin_memory() for name in PlainBatch.__dataclass_fields__))
                shown = shown.pin_memory()
            works.append(Work(batch, shown, weight, part is parts[-1]))
    return works


def decode_all(files: list[ImageFile], hashes: np.ndarray, preprocess: Preprocessor, workers: int) -> torch.Tensor:
    """Pixels uint8 [N, 3, side, side] of all pictures."""
    loader = decoded_batches(DecodedImages(files, hashes, preprocess), batch=16, workers=workers)
    return torch.cat([pixels for pixels, _, _ in loader if pixels is not None])


class PlainTrainer:
    """Trains on prepared passes, round and round."""

    def __init__(self, model: PlainModel, works: list[Work], device: torch.device, *, lr: float, train_all: bool) -> None:
        self.model, self._device, self._works = model, device, works
        model.projector.requires_grad_(True)
        model.llm.requires_grad_(train_all).train()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=lr, fused=True)
        self.compiled, self.compile_seconds = False, 0.0

    def run(self, steps: int, window: Window | None = None) -> None:
        """So many steps; `window` is called after each."""
        for work in self._passes(steps):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
                loss = self.model(work.batch.to(self._device), work.pixels.to(self._device, non_blocking=True))
            (loss * work.weight).backward()
            if work.last:
                nn.utils.clip_grad_norm_(self._trained, 1.0)
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
                if window:
                    window()

    def _passes(self, steps: int) -> Iterator[Work]:
        for work in cycle(self._works):
            yield work
            steps -= work.last
            if not steps:
                return

    def choose(self) -> float:
        """Compile the layers if that is faster, having met every width; returns what a step takes, in seconds."""
        every = sum(work.last for work in self._works)
        self.run(2)
        eager = self._seconds(TRIAL)
        self.model.set_compiled(True, self._device)
        began = time.perf_counter()
        self.run(every)
        wait_for(self._device)
        spent = time.perf_counter() - began
        fast = self._seconds(TRIAL)
        self.compile_seconds = max(0.0, spent - every * fast / TRIAL)
        self.compiled = fast < eager
        if not self.compiled:
            self.model.set_compiled(False, self._device)
        return min(eager, fast) / TRIAL

    def held_bytes(self) -> int:
        """Weights and the optimiser's moments."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        return weights_bytes(self.model) + sum(value.nbytes for value in moments if value.device.type == self._device.type)

    def _seconds(self, steps: int) -> float:
        wait_for(self._device)
        began = time.perf_counter()
        self.run(steps)
        wait_for(self._device)
        return time.perf_counter() - began
