"""RMSNorm for CPUs, beside Transformers' own: the same function in pieces that stay in a core's cache, backward written out.

Autograd would keep half a dozen float32 copies of the activations and pass through them: a tenth of the memory of a small
model's training, and some of its time. Shapes: n tokens, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.vlm.model.attention import FAMILIES

PIECE = 1 << 19  # numbers


@contextmanager
def lean_norms(language_model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Within, the norms around the decoder's blocks compute so, but for compiled layers and families not known to be built so."""
    norms: list[Any] = []
    if on and language_model.config.model_type in FAMILIES:
        decoder: Any = language_model.get_decoder()
        layers = (layer for layer in decoder.layers if "forward" not in layer.__dict__)
        between = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in layers)
        norms = [decoder.norm, *(norm for both in between for norm in both)]
    for norm in norms:
        norm.forward = partial(rms_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def rms_norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    """What `norm` makes of states [.., D]; under autocast already in the number format its products would round it to."""
    plain = torch.promote_types(states.dtype, norm.weight.dtype)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else plain
    return RMSNorm.apply(states, norm.weight, norm.variance_epsilon, dtype)


class RMSNorm(torch.autograd.Function):
    """weight * states / sqrt(mean(states²) + eps); Zhang and Sennrich 2019 (arXiv 1910.07467)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """states [.., D], weight [D] -> [.., D] in `dtype`, bit for bit as Transformers' LlamaRMSNorm."""
        flat = states.reshape(-1, states.shape[-1])
        out, scale = torch.empty_like(flat, dtype=dtype), torch.empty(len(flat), 1)
        for piece in _pieces(flat):
            wide = flat[piece].float()
            scale[piece] = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
            out[piece] = (wide * scale[piece]).to(states.dtype) * weight
        ctx.save_for_backward(flat, scale, weight)
        return out.view(states.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        flat, scale, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(flat.shape)
        of_states = torch.empty_like(flat)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for piece in _pieces(flat):
            normed, found = flat[piece] * scale[piece], gradient[piece].float()
            if of_weight is not None:
                of_weight += (found * normed).sum(0)
            found = found * weight
            away = (found * normed).mean(-1, keepdim=True)
            of_states[piece] = found.addcmul_(normed, away, value=-1).mul_(scale[piece])
        return of_states.view(gradients[0].shape), None if of_weight is None else of_weight.to(weight.dtype), None, None


def _pieces(flat: torch.Tensor) -> Iterator[slice]:
    rows = max(1, PIECE // flat.shape[1])
    return (slice(start, start + rows) for start in range(0, len(flat), rows))
