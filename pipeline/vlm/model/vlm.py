"""Projector, splice, language model: the vision-language model, composed of parts that stay themselves.

Shapes: B rows, T tokens, S images in the batch, P patches, Dv vision width, D hidden size, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.vlm.batches import Batch
from pipeline.vlm.model.attention import branch_mask, mask_for, unpacked_rows
from pipeline.vlm.model.cross_entropy import at, chunked_cross_entropy, logits_only_at, too_large
from pipeline.vlm.model.language_model import hidden_size
from pipeline.vlm.model.last_layer import last_block_only_at
from pipeline.vlm.model.packed_attention import block_mask
from pipeline.vlm.model.probing import has_plain_head
from pipeline.vlm.model.roles import backbone, output_head
from pipeline.vlm.model.splice import splice


class VisionLanguageModel(nn.Module):
    """A projector and a language model; patch features come from outside, so no vision tower is in here."""

    projector: nn.Sequential
    language_model: PreTrainedModel

    def __init__(self, projector: nn.Sequential, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.projector, self.language_model = projector, language_model
        self.router_trains = False
        self._plain_head: bool | None = None

    @property
    def plain_head(self) -> bool:
        """Whether logits are the vocabulary projection and nothing more; tried out when first asked for."""
        if self._plain_head is None:
            self._plain_head = has_plain_head(self.language_model)
        return self._plain_head

    @property
    def hidden_size(self) -> int:
        """D, the width of the language model's token embeddings."""
        return hidden_size(self.language_model)

    @property
    def vocabulary(self) -> int:
        """V, the tokens that the language model chooses from."""
        return int(self.language_model.config.vocab_size)

    def embed(self, ids: torch.Tensor, features: torch.Tensor, row: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Input embeddings [B, T, D] of ids [B, T], with features [S, P, Dv] projected and spliced in (see `splice`)."""
        projected = self.projector(features.to(next(self.projector.parameters()).dtype))
        return splice(self.language_model.get_input_embeddings()(ids), projected, row, start)

    def forward(self, batch: Batch, features: torch.Tensor, *, each: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropy over supervised tokens, and a mixture's router loss (0 where none trains).

        features: [S, P, Dv] of the batch's images, in the order of `batch.slots`. `each`: of every token, [supervised].

        Hidden states are gathered at supervised positions before the vocabulary projection, so [B, T, V] never exists.
        Right padding needs no mask: a causal model's real tokens never see it. Only a router's own loss would count it.
        """
        extra: dict[str, Any] = {"output_router_logits": True, "attention_mask": batch.real.long()} if self.router_trains else {}
        if batch.branch is not None:
            if self.router_trains:
                raise ValueError("a router's loss counts tokens, which are not its own in rows that share or are packed")
            document, branch = batch.document, batch.branch
            mask: Any = mask_for(branch_mask(branch), self.language_model) if document is None else block_mask(document, branch)
            extra = {"attention_mask": mask, "position_ids": batch.position}
        extra |= {"inputs_embeds": self.embed(batch.ids, features, batch.slot_row, batch.slot_start), "use_cache": False}
        pieces = not self.router_trains and too_large(len(batch.labels), self.language_model.config) and self.plain_head
        # the same loss for less work: see `pipeline.vlm.model.last_layer`
        leaner = nullcontext() if self.router_trains else last_block_only_at(batch.loss_positions, self.language_model)
        with unpacked_rows(), leaner:
            return self._loss(batch, extra, pieces=pieces, reduction="none" if each else "sum")

    def _loss(self, batch: Batch, extra: dict[str, Any], *, pieces: bool, reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
        if pieces:
            states = at(backbone(self.language_model)(**extra).last_hidden_state, batch.loss_positions)  # [supervised, D]
            loss = chunked_cross_entropy(output_head(self.language_model), states, batch.labels, reduction=reduction)
            return loss, loss.new_zeros(())
        with logits_only_at(batch.loss_positions, self.language_model):
            output = self.language_model(**extra)
        loss = F.cross_entropy(output.logits[0].float(), batch.labels, reduction=reduction)  # logits [1, supervised, V]
        router = getattr(output, "aux_loss", None) if self.router_trains else None
        return loss, loss.new_zeros(()) if router is None else router * self.language_model.config.router_aux_loss_coef
