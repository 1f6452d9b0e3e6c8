"""Torch's sdpa for families that are not packed on GPUs, with gradients that have the same bits in every run.

Its fused kernels add to the gradients in whatever order blocks end, unless torch is told to be deterministic while they run. Told
so for a whole run it would refuse or slow down what needs no such order, so it is told for these kernels alone.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ORDERED = "ordered"
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN's has no such order
DEEP = 4  # steps of the graph from what Transformers returns to the kernel: it is transposed and copied


def ordered_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As Transformers' sdpa: query [B, H, T, D], key and value [B, K, T, D], K dividing H -> [B, T, H, D].

    In a compiled layer it is sdpa as it comes: what a compiler makes of it differs between runs in any case.
    """
    if torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    with sdpa_kernel(KERNELS):
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    node, depth = found.grad_fn, 0
    while node is not None and depth < DEEP and "ScaledDotProduct" not in node.name():
        node, depth = (node.next_functions[0][0] if node.next_functions else None), depth + 1
    if node is not None and "ScaledDotProduct" in node.name():  # else it is made of products, whose order is one
        _run_in_order(node)
    return found, None


def _run_in_order(node: torch.autograd.graph.Node) -> None:
    """Have torch be deterministic from this node's beginning to its end."""
    before: list[bool] = []

    def begin(_: Any) -> None:
        before.append(torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)

    def end(*_: Any) -> None:
        torch.use_deterministic_algorithms(before.pop())

    node.register_prehook(begin)
    node.register_hook(end)


AttentionInterface.register(ORDERED, ordered_attention)
AttentionMaskInterface.register(ORDERED, sdpa_mask)
