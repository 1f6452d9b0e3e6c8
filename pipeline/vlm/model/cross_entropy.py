"""Cross-entropy over a large vocabulary without ever holding all of its logits."""

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

MOST = 1 << 26  # logits at once: 256 MB in float32, and as much again for their gradient
RESCALING = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # families that do more than a matrix product


def too_large(supervised: int, config: PretrainedConfig) -> bool:
    """Whether the logits of so many supervised tokens should be made in pieces, and can be."""
    plain = not any(getattr(config, name, None) for name in RESCALING)
    return plain and supervised * config.get_text_config().vocab_size > MOST


def chunked_cross_entropy(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of `head(hidden)` [S, V] against labels int64 [S]; hidden [S, D] holds supervised positions only.

    Logits exist for a piece of the positions at a time, in the backward pass too, where they are computed again: a third
    more work in the vocabulary projection for memory that does not grow with S × V.
    """
    rows = max(1, MOST // int(head.weight.shape[0]))

    def piece(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction="sum")

    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    losses = [checkpoint(piece, states, wanted, use_reentrant=False) for states, wanted in parts]
    return torch.stack(losses).sum()
