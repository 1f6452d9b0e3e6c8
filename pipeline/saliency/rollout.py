"""Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): whose embeddings a token's last state is made of.

In every layer a token is half itself, by the residual, and half what its heads attend to, each head alike. Rows are traced back
from the last layer to the first, so no [T, T] product is made. Shapes: R rows, T tokens, H heads, L layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from pipeline.core import RESOURCE, PipelineError
from pipeline.vlm.model import mixes_conversations

MOST = 4 << 30  # bytes of all layers' attention, which is held at once
CLOSE = 1e-2  # how far the weights that a token gives may be from adding up, which bfloat16 rounds


def trace_back(rows: torch.Tensor, layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights [R, T] over the last layer's tokens -> [R, T] over the first layer's; `layers`: weights [H, T, T] of each."""
    for weights in reversed(layers):
        rows = 0.5 * rows + 0.5 * rows @ weights.float().mean(0)
    return rows


@contextmanager
def seen_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, attention is the model's own eager one, which gives its weights.

    Raises `PipelineError` naming a family that has none.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
    except (ValueError, ImportError, AttributeError):
        raise unseen(model) from None
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def require_room(model: PreTrainedModel, layers: int, tokens: int) -> None:
    """Raises `PipelineError` where the attention of so many layers among so many tokens would not fit `MOST`."""
    needed = layers * int(getattr(model.config, "num_attention_heads", 1)) * tokens**2 * 4
    if needed > MOST:
        raise PipelineError(
            f"the attention of {layers} layers among {tokens:,} tokens is {needed / 1e9:.1f} GB, more than {MOST / 1e9:.1f}",
            remedy="show fewer pictures, ask for a shorter answer, or take --by gradient",
            code=RESOURCE,
        )


def weights_of(model: PreTrainedModel, attentions: Any, layers: int, tokens: int, *, causal: bool) -> list[torch.Tensor]:
    """What a forward pass with `output_attentions` gave for one row, as [H, T, T] of each layer.

    Raises `PipelineError` naming a family of which not every layer is softmax attention among its tokens: a trace would end there.
    """
    found = [weights[0] for weights in attentions or () if torch.is_tensor(weights) and weights.ndim == 4 and len(weights) == 1]
    if len(found) != layers or any(weights.shape[1:] != (tokens, tokens) for weights in found):
        raise unseen(model)
    for weights in found:
        sound = bool((weights >= 0).all()) and bool((weights.float().sum(-1) <= 1 + CLOSE).all())
        if not sound or (causal and bool(weights.triu(1).any())):  # some mask otherwise once they are loaded
            raise unseen(model)
    return found


def require_attention_alone(language_model: PreTrainedModel) -> None:
    """Raises `PipelineError` for a family whose layers pass on something beside their attention (Falcon-H1's state space)."""
    if language_model not in _mixing:
        _mixing[language_model] = "what a mask hides" in mixes_conversations(language_model)
    if _mixing[language_model]:
        raise unseen(language_model)


_mixing: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()


def unseen(model: PreTrainedModel) -> PipelineError:
    return PipelineError(
        f"the attention of a {model.config.model_type} cannot be traced back: it is not softmax attention all through",
        remedy="take --by gradient",
    )
