"""Which attention a language model trains and is measured with, by what it has and the device, and the mask of shared rows."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from pipeline.core.attention import GROUPED
from pipeline.vlm.model.language_model import takes_sdpa
from pipeline.vlm.model.ordered_attention import ORDERED
from pipeline.vlm.model.packed_attention import NARROWEST, PACKED

FAMILIES = {"llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3"}  # softmax over rotated queries and keys, no more


# Where configurations say how far back some of their layers look
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")


def choose_attention(language_model: PreTrainedModel, device: torch.device, longest: int, *, router_trains: bool = False) -> str:
    """The name of the attention to train and measure with; the longest row has `longest` tokens. All compute the same.

    On a GPU the packed one, for families it fits, unless a router trains, which counts tokens of rows that are its own; else
    sdpa, in an order that gives the same bits again.
    On a CPU ours (`pipeline.core.attention`), up to the length where its [T, T] scores cost more memory than they save
    time; for other families eager, whose backward is faster than sdpa's below 512 tokens. Eager is all that some have.
    """
    config = language_model.config
    if can_pack(config, device) and not router_trains:
        return PACKED
    if device.type == "cpu" and config.model_type in FAMILIES and longest <= 1024:
        return GROUPED
    if not takes_sdpa(language_model) or (device.type == "cpu" and longest <= 512):
        return "eager"
    return ORDERED if device.type == "cuda" and language_model._supports_attention_backend else "sdpa"


def can_pack(config: PretrainedConfig, device: torch.device) -> bool:
    """Whether rows are packed: on a GPU that Triton compiles for, and for a family whose attention this is.

    On CPUs a packed loop gained nothing over padding to neighbours of like length, and a dense mask took twice the time.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return is_plain(config) and torch.cuda.get_device_capability(device) >= (7, 0)


def is_plain(config: PretrainedConfig) -> bool:
    """Whether a language model's attention is softmax over all that is seen, without dropout, in heads not too narrow."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.model_type in FAMILIES and sliding_window(config) is None
    return plain and not getattr(config, "attention_dropout", 0.0) and width >= NARROWEST


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that a language model's attention looks back, or None where it sees all: only then masks are ours to make."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds and not any("sliding" in kind or "chunked" in kind or "local" in kind for kind in map(str, kinds)):
        return None  # a length that no layer asks for
    if not getattr(config, "use_sliding_window", True):
        return None
    return next((found for name in WINDOWS if isinstance(found := getattr(config, name, None), int) and found > 0), None)


@contextmanager
def unpacked_rows() -> Iterator[None]:
    """Within, Transformers takes rows of consecutive positions for what they are, one sequence each.

    It would look for several in a row by their positions, and on a GPU the host would wait for the answer in every pass.
    """
    plain = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # noqa: ARG005 (called by that name)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = plain


def branch_mask(branch: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T], true where a token sees another: an earlier one of the prefix or of its own branch [B, T]."""
    order = torch.arange(branch.shape[1], device=branch.device)
    query, key = branch[:, :, None], branch[:, None, :]
    return ((order[:, None] >= order[None]) & ((query == key) | (key == 0)))[:, None]


def mask_for(seen: torch.Tensor, language_model: PreTrainedModel) -> torch.Tensor:
    """A mask bool [B, 1, T, T] as the attention in use takes it: sdpa asks for booleans, eager and ours add numbers."""
    if language_model.config._attn_implementation not in ("eager", GROUPED):
        return seen
    weight: Any = language_model.get_input_embeddings().weight
    dtype: torch.dtype = weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
