"""The last decoder layer, only where something is asked of it: at tokens whose next one is supervised.

What its feed-forward block, its queries and its output projection compute at a token goes to that token's logits and nowhere
else, so leaving out the others changes no loss and no gradient (but for rounding); keys and values are of all tokens. In rows
that are mostly picture that is nearly an eighth of a small model's work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.vlm.model.attention import FAMILIES

MULTIPLE = 64  # of positions: few shapes, since oneDNN keeps a program for each; position 0 fills up


@contextmanager
def last_layer_only_at(kept: torch.Tensor, language_model: PreTrainedModel) -> Iterator[None]:
    """Within, those blocks of the last layer see positions `kept`, int64 [n], of the B × T; the others get zeros.

    Does nothing for families that are not known to be built so, and for layers that are compiled, which would be anew.
    """
    layer: Any = language_model.get_decoder().layers[-1] if language_model.config.model_type in FAMILIES else None
    if layer is None or "forward" in layer.__dict__:
        yield
        return
    blocks = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]
    before = [block.__dict__.get("forward") for block in blocks]
    padded = nn.functional.pad(kept, (0, -len(kept) % MULTIPLE))
    for block in blocks:
        block.forward = _only_at(kept, padded, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _only_at(kept: torch.Tensor, padded: torch.Tensor, plain: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def forward(states: torch.Tensor) -> torch.Tensor:
        flat = states.flatten(0, 1)  # [B * T, D]
        found = plain(flat[padded][None])[0, : len(kept)]
        return found.new_zeros(len(flat), found.shape[-1]).index_copy(0, kept, found).view(*states.shape[:-1], -1)

    return forward
