"""Attention for CPUs, beside Transformers' own: the same function, without the copies that make it slow there.

The query is scaled instead of the scores, the mask is what the product is added to, key heads are not repeated for the
query heads that share them, the softmax stays in the number format of the scores (its kernel sums in float32 anyway), and
under a causal mask the half that nothing sees is not computed (`pipeline.core.causal`).
In bfloat16 at [16, 8, 273, 64], forward and backward on one thread of a busy AMD Zen 5, taken in turn in one run: eager took
2.0 to 2.8 times as long, sdpa 1.9 to 2.2 times (least of 22 rounds, two runs).
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from pipeline.core.causal import CausalAttention

GROUPED = "grouped"
LOWEST = -1e30  # float32's least number would be minus infinity in bfloat16, and a row that sees nothing not a number


@torch.compiler.disable  # a compiled layer leaves it as it is: a compiler's would compute what the causal mask hides
def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, Tq, D], key and value [B, K, Tk, D], K dividing H -> [B, Tq, H, D].

    attention_mask is added to the scores: [B or 1, 1, Tq, Tk], or None for attention to everything. Where as many are asked
    as are seen it is a causal one, as all masks of `FAMILIES` are: nothing later than the query is seen.
    """
    batch, heads, asked, width = query.shape
    shared, seen = key.shape[1], key.shape[2]
    scaled = query * (width**-0.5 if scaling is None else scaling)
    dropout = dropout if module.training else 0.0
    causal = attention_mask is not None and asked == seen and not dropout
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else scaled.dtype
    mask = None if attention_mask is None else _limited(attention_mask[:, 0], dtype)  # [B or 1, Tq, Tk]
    if mask is not None and len(mask) > 1:
        mask = mask.repeat_interleave(shared, 0)
    rows = heads // shared
    keys, values = key.reshape(batch * shared, seen, width), value.reshape(batch * shared, seen, width)
    if causal:
        heads_of = scaled.to(dtype).reshape(batch * shared, rows, asked, width)
        with torch.autocast("cpu", enabled=False):
            out = CausalAttention.apply(heads_of, keys.to(dtype), values.to(dtype), mask)
        return out.reshape(batch, heads, asked, width).transpose(1, 2), None
    scaled = scaled.reshape(batch * shared, rows * asked, width)
    if mask is None:
        scores = torch.bmm(scaled, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(mask.repeat(1, rows, 1).expand(batch * shared, -1, -1), scaled, keys.transpose(1, 2))
    weights = torch.softmax(scores, -1)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return torch.bmm(weights, values).view(batch, heads, asked, width).transpose(1, 2), None


def _limited(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return mask.clamp(min=max(LOWEST, torch.finfo(dtype).min)).to(dtype)


def _one_mask_for_all(*, batch_size: int, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """Eager's mask, once instead of once a row where no row is padded."""
    return eager_mask(batch_size=1 if attention_mask is None else batch_size, attention_mask=attention_mask, **options)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, _one_mask_for_all)
