"""The other side of the benchmark: a trainer that works as MiniMind-V's of December 2025 does, written from its description.

Everything is done where it is needed, each time anew: text is tokenised and pictures are decoded for every item in the
loader's workers, every row is padded to one length, the vision tower runs on every batch, logits are computed at every
token and masked afterwards. Its trainer's own choices are kept: the learning rate starts at 1.1 × lr, AdamW decays
every parameter, gradients are clipped over the whole model, the CLIP is loaded with its text half.

Two differences, so that both sides do equal work: the newline behind an answer is not a target, and nothing is saved.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

WORKERS = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """A stage's numbers, its defaults as published."""

    length: int
    batch_size: int
    lr: float
    train_all: bool
    accumulation: int = 1
    clip_norm: float = 1.0


RECIPES = {
    "pretrain": Recipe(length=640, batch_size=16, lr=4e-4, train_all=False),
    "sft": Recipe(length=1536, batch_size=4, lr=1e-6, train_all=True),
}


class Rows(Dataset):
    """Item -> ids [L-1], next ids [L-1], whether those are targets [L-1], pixels [k, 3, 224, 224]; L is the padded length."""

    def __init__(self, records: Path, images: Path, *, llm: Path, clip: Path, length: int, image_token: str, tokens: int) -> None:
        self._rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
        self._images, self._length = images, length
        self._tokenizer: Any = AutoTokenizer.from_pretrained(llm)
        self._processor = AutoImageProcessor.from_pretrained(clip, backend="pil")
        self._placeholders = image_token * tokens
        self._begin = self._tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self._end = self._tokenizer.eos_token_id

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, ...]:
        row = self._rows[item]
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": turn["content"].replace("<image>", self._placeholders)}
            for i, turn in enumerate(row["conversations"])
        ]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False).input_ids[: self._length]
        ids += [self._tokenizer.pad_token_id] * (self._length - len(ids))
        targets = self._answers(ids)
        pictures = [self._pixels(name.strip()) for name in row["image"].split(",")]
        return torch.tensor(ids[:-1]), torch.tensor(ids[1:]), torch.tensor(targets[1:]), torch.stack(pictures)

    def _answers(self, ids: list[int]) -> list[int]:
        """1 at the assistant's words and the end of its turn, found by looking for what stands before and behind them."""
        found, at = [0] * len(ids), 0
        while at < len(ids):
            if ids[at : at + len(self._begin)] != self._begin:
                at += 1
                continue
            start = end = at + len(self._begin)
            while end < len(ids) and ids[end] != self._end:
                end += 1
            for position in range(start, min(end + 1, len(ids))):
                found[position] = 1
            at = end + 1
        return found

    def _pixels(self, name: str) -> torch.Tensor:
        picture = Image.open(self._images / name).convert("RGB")
        return self._processor(images=picture, return_tensors="pt")["pixel_values"][0]


class NaiveModel(nn.Module):
    """CLIP, one linear layer and a language model in one class; the encoder runs in every forward pass."""

    def __init__(self, clip: Path, llm: Path, *, image_id: int, train_all: bool, projector_seed: int) -> None:
        super().__init__()
        self.vision_encoder: Any = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval()
        self.language_model: Any = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32, attn_implementation="sdpa")
        torch.manual_seed(projector_seed)
        hidden = self.language_model.config.hidden_size
        self.vision_proj = nn.Linear(self.vision_encoder.config.vision_config.hidden_size, hidden)
        self._image_id = image_id
        self.vision_encoder.requires_grad_(False)
        self.language_model.requires_grad_(train_all)

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """ids [B, T], pixels [B, k, 3, 224, 224] -> logits [B, T, V]."""
        with torch.no_grad():
            features = [
                self.vision_encoder.vision_model(pixel_values=pixels[:, number]).last_hidden_state[:, 1:]
                for number in range(pixels.shape[1])
            ]
        projected = self.vision_proj(torch.stack(features, dim=1))  # [B, k, P, D]
        embeddings = self._inject(ids, self.language_model.get_input_embeddings()(ids), projected)
        return self.language_model(inputs_embeds=embeddings, use_cache=False).logits

    def _inject(self, ids: torch.Tensor, embeddings: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Windows of P placeholders are looked for in every row, and the row is put together anew round each."""
        patches = projected.shape[2]
        hits = (ids.unfold(1, patches, 1) == self._image_id).all(dim=2)  # [B, T - P + 1]
        rows = []
        for i in range(len(ids)):
            row = embeddings[i]
            for number, start in enumerate(hits[i].nonzero().flatten().tolist()[: projected.shape[1]]):
                row = torch.cat([row[:start], projected[i, number].to(row.dtype), row[start + patches :]])[: len(ids[i])]
            rows.append(row)
        return torch.stack(rows)


def masked_loss(logits: torch.Tensor, following: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy at every token of [B, T, V], then the mean over those that are targets."""
    every = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return (every * targets.flatten()).sum() / targets.sum()


def make_loader(rows: Dataset, steps: list[np.ndarray]) -> DataLoader:
    """Batches of these row numbers, decoded and tokenised in worker processes."""
    return DataLoader(rows, batch_sampler=[step.tolist() for step in steps], num_workers=WORKERS)


def train_naive(
    model: NaiveModel, batches: Iterable[list[torch.Tensor]], recipe: Recipe, *, steps: int, precision: str
) -> list[float]:
    """One epoch of `steps` micro-batches; returns their losses. bfloat16 is autocast, as on its GPUs."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if recipe.train_all or p.requires_grad), lr=recipe.lr)
    model.train()
    losses = []
    for step, (ids, following, targets, pixels) in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr / 10 + recipe.lr / 2 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = masked_loss(model(ids, pixels), following, targets)
        (loss / recipe.accumulation).backward()
        losses.append(loss.detach())
        if step % recipe.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return [float(loss) for loss in losses]
