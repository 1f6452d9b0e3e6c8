"""Logits at supervised tokens only, and cross-entropy over a large vocabulary without ever holding all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.vlm.model.roles import output_head

MOST = 1 << 26  # logits at once: 256 MB in float32, and as much again for their gradient


@contextmanager
def logits_only_at(positions: torch.Tensor, language_model: PreTrainedModel) -> Iterator[None]:
    """Within, the vocabulary projection sees positions [n] of the B × T: logits are [1, n, V], in the order of positions.

    What a family does to its logits afterwards (scaling, a soft cap) it still does. `logits_to_keep` would take a mask only
    from Transformers 5.21 on, and on a GPU the host would wait to count it.
    """
    hook = output_head(language_model).register_forward_pre_hook(lambda _, inputs: (at(inputs[0], positions)[None],))
    try:
        yield
    finally:
        hook.remove()


def at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows [n, D] of states [B, T, D] at positions [n] of the B × T."""
    return states.flatten(0, 1).index_select(0, positions)


def too_large(supervised: int, config: PretrainedConfig) -> bool:
    """Whether the logits of so many supervised tokens should be made in pieces."""
    return bool(supervised * config.get_text_config().vocab_size > MOST)


def chunked_cross_entropy(head: Any, hidden: torch.Tensor, labels: torch.Tensor, *, reduction: str = "sum") -> torch.Tensor:
    """Summed cross-entropy (`reduction` none: that of each label, [S]) of `head(hidden)` [S, V] against labels int64 [S].

    hidden [S, D] holds supervised positions only. Logits exist for a piece of the positions at a time, in the backward pass too,
    where they are computed again: a third more work in the vocabulary projection for memory that does not grow with S × V.
    """
    rows = max(1, MOST // int(head.weight.shape[0]))

    def piece(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction=reduction)

    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    losses = [checkpoint(piece, states, wanted, use_reentrant=False) for states, wanted in parts]
    return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
