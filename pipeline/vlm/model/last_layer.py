"""The last decoder layer's feed-forward block, only where something is asked of it: at tokens whose next one is supervised.

What it computes at a token goes to that token's logits and nowhere else, so leaving out the others changes no loss and no
gradient (but for rounding). In rows that are mostly picture that is a twentieth of a small model's work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.vlm.model.attention import FAMILIES
from pipeline.vlm.model.roles import decoder_layers

MULTIPLE = 64  # of positions: few shapes, since oneDNN keeps a program for each; position 0 fills up


@contextmanager
def last_block_only_at(kept: torch.Tensor, language_model: PreTrainedModel) -> Iterator[None]:
    """Within, that block sees positions `kept`, int64 [n], of the B × T; the others get zeros.

    Does nothing for families that are not known to be built so, and for layers that are compiled, which would be anew.
    """
    layer: Any = decoder_layers(language_model)[-1] if language_model.config.model_type in FAMILIES else None
    if layer is None or "forward" in layer.__dict__:
        yield
        return
    plain, before = layer.mlp.forward, layer.mlp.__dict__.get("forward")
    padded = nn.functional.pad(kept, (0, -len(kept) % MULTIPLE))

    def forward(states: torch.Tensor) -> torch.Tensor:
        flat = states.flatten(0, 1)  # [B * T, D]
        found = plain(flat[padded][None])[0, : len(kept)]
        return found.new_zeros(flat.shape).index_copy(0, kept, found).view(states.shape)

    layer.mlp.forward = forward
    try:
        yield
    finally:
        del layer.mlp.forward
        if before is not None:
            layer.mlp.forward = before
