"""Conversations end to end in one row, on GPUs: nothing is padded but a tail, and attention keeps them apart.

FlexAttention (arXiv 2412.05496) computes scores in blocks and leaves out those in which nothing is seen. Which these are
follows from where conversations begin and end, so no [T, T] mask is ever made. Passes without such a mask (held-out loss,
generation) are Transformers' sdpa. Shapes: B rows, T tokens, N = T / BLOCK blocks.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pipeline.vlm.batches.packing import BLOCK, LENGTHS

PACKED = "packed"
NARROWEST = 16  # head width that the kernel takes


def block_mask(document: torch.Tensor, branch: torch.Tensor) -> BlockMask:
    """A token sees earlier ones of its own document that are of the shared prefix or of its own branch.

    Args:
        document: int [B, T], rising along a row, so a block's documents are a range; each token of padding is its own.
        branch: int [B, T] (see `pipeline.vlm.batches.sharing`), 0 for a prefix. T is a multiple of BLOCK.

    Blocks are left out where documents cannot meet and taken whole where all is seen; in all others each pair is asked.
    """

    def seen(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        of_key = branch[row, key]
        together = (document[row, query] == document[row, key]) & ((of_key == 0) | (branch[row, query] == of_key))
        return together & (query >= key)

    (first, last), (least, most) = (ids.unflatten(1, (-1, BLOCK)).aminmax(dim=-1) for ids in (document, branch))  # [B, N]
    number = torch.arange(first.shape[1], device=document.device)
    some = (number[:, None] >= number) & (_of_query(first) <= _of_key(last))  # [B, N, N]
    uniform = (first == last) & (least == most)
    whole = (number[:, None] > number) & (_of_query(first) == _of_key(last)) & (_of_query(last) == _of_key(first))
    prefix = (least == 0) & (most == 0)
    whole &= _of_key(prefix) | (_of_query(uniform) & _of_key(uniform) & (_of_query(least) == _of_key(least)))
    return BlockMask.from_kv_blocks(*_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=seen)


def _of_query(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, :, None]


def _of_key(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, None, :]


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, N, N] -> how many key blocks each query block has, int32 [B, 1, N], and which come first, int32 [B, 1, N, N]."""
    counts, order = blocks.sum(-1), torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return counts.to(torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


@cache
def _compiled() -> Any:
    """The kernel; one is made for each of the few lengths, forward and backward.

    Past its limit of programs torch would go on with attention that is not fused and holds all [T, T] scores, without a word;
    with `fullgraph` it is an error.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * LENGTHS)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, T, D], key and value [B, K, T, D], K dividing H -> [B, T, H, D]; sdpa where the mask is no block mask."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    attend = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    grouped = query.shape[1] != key.shape[1]
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotation leaves them in float32, which autocast does not see here
    found = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
