"""Projector, splice, language model: the vision-language model, composed of parts that stay themselves.

Shapes: B rows, T tokens, S images in the batch, P patches, Dv vision width, D hidden size, V vocabulary.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.attention import NAME
from pipeline.batches import Batch
from pipeline.dividing import whole
from pipeline.errors import ARTEFACT, PipelineError
from pipeline.last_layer import computed_at
from pipeline.loading import load_pretrained
from pipeline.packing import block_mask
from pipeline.sharing import branch_mask
from pipeline.vocabulary import chunked_cross_entropy, too_large


def build_projector(kind: str, width: int, hidden: int) -> nn.Sequential:
    """Patch features [.., Dv] -> token embeddings [.., D].

    linear: MiniMind-V (Dec 2025). mlp: LLaVA-1.5 (arXiv 2310.03744) with the tanh form of GELU, which Transformers, vLLM
    and llama.cpp share. norm_mlp: MiniMind-V (2026), a LayerNorm first, exact GELU.
    """
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, hidden))
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
    if kind == "mlp":
        return nn.Sequential(first, nn.GELU(approximate="tanh"), second)
    if kind == "norm_mlp":
        return nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), second)
    raise ValueError(f"unknown projector kind {kind!r}")


def splice(embeddings: torch.Tensor, features: torch.Tensor, row: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Put projected features where their placeholders stand.

    Args:
        embeddings: [B, T, D] of all tokens, placeholders included.
        features: [S, P, D], one run an image.
        row, start: int64 [S], the row of each run and the position of its first placeholder.

    Returns a new [B, T, D]; gradients flow to both inputs. Raises ValueError when counts do not
    match; that runs lie within their rows is `collate`'s to check, since asking the device here would stall it.
    """
    if not len(features) == len(row) == len(start):
        raise ValueError(f"{len(features)} images' features for {len(row)} runs of placeholders")
    positions = start[:, None] + torch.arange(features.shape[1], device=start.device)  # [S, P]
    return embeddings.index_put((row[:, None].expand_as(positions), positions), features.to(embeddings.dtype))


class VisionLanguageModel(nn.Module):
    """A projector and a language model; patch features come from outside, so no vision tower is in here."""

    projector: nn.Sequential
    language_model: PreTrainedModel

    def __init__(self, projector: nn.Sequential, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.projector, self.language_model = projector, language_model
        self.router_trains = False

    @property
    def hidden_size(self) -> int:
        """D, the width of the language model's token embeddings."""
        return hidden_size(self.language_model)

    def embed(self, ids: torch.Tensor, features: torch.Tensor, row: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Input embeddings [B, T, D] of ids [B, T], with features [S, P, Dv] projected and spliced in (see `splice`)."""
        projected = self.projector(features.to(next(self.projector.parameters()).dtype))
        return splice(self.language_model.get_input_embeddings()(ids), projected, row, start)

    def forward(self, batch: Batch, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropy over supervised tokens, and a mixture's router loss (0 where none trains).

        Hidden states are gathered at supervised positions before the vocabulary projection, so [B, T, V] never exists.
        Right padding needs no mask: a causal model's real tokens never see it. Only a router's own loss would count it.
        """
        extra: dict[str, Any] = {"output_router_logits": True, "attention_mask": batch.real.long()} if self.router_trains else {}
        if batch.branch is not None:
            if self.router_trains:
                raise ValueError("a router's loss counts tokens, which are not its own in rows that share or are packed")
            document, branch = batch.document, batch.branch
            mask: Any = self._mask(branch) if document is None else block_mask(document, branch)
            extra = {"attention_mask": mask, "position_ids": batch.position}
        extra |= {"inputs_embeds": self.embed(batch.ids, features, batch.slot_row, batch.slot_start), "use_cache": False}
        with nullcontext() if self.router_trains else computed_at(batch.kept, self.language_model):
            return self._loss(batch, extra)

    def _loss(self, batch: Batch, extra: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.router_trains and too_large(len(batch.labels), self.language_model.config):
            states = self.language_model.get_decoder()(**extra).last_hidden_state[batch.keep]  # [supervised, D]
            loss = chunked_cross_entropy(self.language_model.get_output_embeddings(), states, batch.labels)
            return loss, loss.new_zeros(())
        output = self.language_model(logits_to_keep=batch.keep, **extra)
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        router = getattr(output, "aux_loss", None) if self.router_trains else None
        return loss, loss.new_zeros(()) if router is None else router * self.language_model.config.router_aux_loss_coef

    def _mask(self, branch: torch.Tensor) -> torch.Tensor:
        """Who sees whom, as the attention in use takes it: sdpa asks for booleans, eager and ours add numbers."""
        seen = branch_mask(branch)
        if self.language_model.config._attn_implementation not in ("eager", NAME):
            return seen
        weight: Any = self.language_model.get_input_embeddings().weight
        dtype: torch.dtype = weight.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def frozen_digest(model: VisionLanguageModel) -> str:
    """Checksum of every parameter that does not train: equal before and after training, or something else wrote to it."""
    return weights_digest(p for p in model.parameters() if not p.requires_grad)


def weights_digest(parameters: Iterable[torch.Tensor]) -> str:
    """Checksum of tensors' bytes, in order."""
    found = xxhash.xxh3_128()
    for parameter in parameters:
        found.update(whole(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def hidden_size(language_model: PreTrainedModel) -> int:
    """D: read off the embedding table, since configs of different families name it differently."""
    table: Any = language_model.get_input_embeddings().weight
    return int(table.shape[1])


def load_language_model(model: str, *, revision: str = "", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Any Transformers causal LM, strictly: a missing weight is an error, never a random one."""
    language_model, info = load_pretrained(
        AutoModelForCausalLM, model, where="llm.model", revision=revision, dtype=dtype, attn_implementation="sdpa"
    )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            raise PipelineError(
                f"{model}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}", where="llm.model", code=ARTEFACT
            )
    return language_model


def hold_frozen_in(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Give the language model's parameters that do not train another number format; its buffers and the others keep theirs."""
    for parameter in model.language_model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def freeze(model: VisionLanguageModel, train: str) -> dict[str, int]:
    """Set what trains: `projector`, `projector+ends` (first and last decoder layer too) or `all`; returns counts by part.

    The one place that touches `requires_grad`.
    """
    language_model = model.language_model
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if train == "all":
        language_model.requires_grad_(True)
    elif train == "projector+ends":
        layers = language_model.get_decoder().layers
        layers[0].requires_grad_(True)
        layers[-1].requires_grad_(True)
    is_mixture = getattr(language_model.config, "router_aux_loss_coef", None) is not None
    model.router_trains = is_mixture and train != "projector"
    return {
        "projector": sum(p.numel() for p in model.projector.parameters() if p.requires_grad),
        "language_model": sum(p.numel() for p in language_model.parameters() if p.requires_grad),
        "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
    }
