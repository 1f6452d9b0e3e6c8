"""Causal attention in blocks of queries, each over the keys up to its end: what stands above the diagonal is never computed.

For CPUs, beside `pipeline.core.attention`. Backward is written out, because autograd would fill a whole gradient for every slice.
Shapes: N batch × key heads, R query heads a key head, T tokens, D head width.
"""

from itertools import pairwise
from typing import Any

import torch

BLOCK = 96  # queries; less saves more arithmetic, but products of small matrices are slow


class CausalAttention(torch.autograd.Function):
    """softmax(query @ key.T + mask) @ value, the query scaled beforehand; all of one float dtype."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """query [N, R, T, D], key and value [N, T, D], mask [N or 1, T, T] with nothing seen above its diagonal."""
        count, shared, tokens, _ = query.shape
        out, weights = torch.empty_like(query), []
        for start, end in _blocks(tokens):
            added = mask[:, start:end, :end].repeat(1, shared, 1).expand(count, -1, -1)
            scores = torch.baddbmm(added, _rows(query, start, end), key[:, :end].transpose(1, 2))
            weights.append(torch.softmax(scores, -1))  # [N, R * block, end]
            out[:, :, start:end] = torch.bmm(weights[-1], value[:, :end]).view(count, shared, end - start, -1)
        ctx.save_for_backward(query, key, value, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, *weights = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (start, end), weight in zip(_blocks(query.shape[2]), weights, strict=True):
            gradient = _rows(gradients[0], start, end)
            of_value[:, :end] += torch.bmm(weight.transpose(1, 2), gradient)
            of_weight = torch.bmm(gradient, value[:, :end].transpose(1, 2))
            of_score = torch._softmax_backward_data(of_weight, weight, -1, weight.dtype)
            of_query[:, :, start:end] = torch.bmm(of_score, key[:, :end]).view_as(of_query[:, :, start:end])
            of_key[:, :end] += torch.bmm(of_score.transpose(1, 2), _rows(query, start, end))
        return of_query, of_key, of_value, None


def _rows(heads: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """[N, R, T, D] -> [N, R * (end - start), D]."""
    return heads[:, :, start:end].reshape(heads.shape[0], -1, heads.shape[3])


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Even blocks of about BLOCK queries."""
    count = max(1, round(tokens / BLOCK))
    edges = [tokens * number // count for number in range(count + 1)]
    return list(pairwise(edges))
