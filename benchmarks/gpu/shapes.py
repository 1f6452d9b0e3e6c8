"""Language models and vision towers of real shapes, and the floating-point operations that a sample needs of them.

A multiplication and an addition count one each. What the model is said to compute is counted, whoever computes it: no padding,
no kernel's recomputation, half of the attention under a causal mask, logits at supervised tokens only. The pipeline leaves
some of it out (the last feed-forward block where nothing is asked of it), which then shows as speed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from benchmarks.world import LLAMAS, TINY_CLIP, TINY_LLAMA

ENDS = {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
QWEN3: dict[str, Any] = {  # Qwen3-0.6B
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
}  # fmt: skip
TINY_QWEN = TINY_LLAMA | {"head_dim": 32, "vocab_size": 6400}
MODELS = ("26m", "135m", "0.6b")
TOWERS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "b16": (CLIPVisionConfig, {"patch_size": 16, "image_size": 224}),  # the class's defaults are CLIP ViT-B's
    "l14-336": (
        CLIPVisionConfig,
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "patch_size": 14, "image_size": 336},
    ),
    "so400m-384": (
        SiglipVisionConfig,
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
         "patch_size": 14, "image_size": 384, "vision_use_head": False},
    ),
}  # fmt: skip


def llm_config(name: str, *, tiny: bool) -> PretrainedConfig:
    """The language model's shape; tiny ones keep the family and have two layers."""
    if name == "0.6b":
        return Qwen3Config(**QWEN3 | (TINY_QWEN if tiny else {}), **ENDS)
    shape = LLAMAS["minimind" if name == "26m" else "smollm2"]
    return LlamaConfig(**shape | (TINY_LLAMA | {"vocab_size": 6400} if tiny else {}), **ENDS)


def make_llm(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Random weights that follow from the seed, on the device."""
    torch.manual_seed(seed)
    with device:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return made.to(device=device, dtype=dtype)


def tower_config(name: str, *, tiny: bool) -> PretrainedConfig:
    """The vision tower's shape; tiny ones are narrow, have two layers and smaller pictures."""
    kind, shape = TOWERS[name]
    small = TINY_CLIP | {"image_size": 7 * shape["patch_size"]} if tiny else {}
    return kind(**shape | small)


def make_tower(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen tower with random weights."""
    torch.manual_seed(0)
    kind: Any = CLIPVisionModel if isinstance(config, CLIPVisionConfig) else SiglipVisionModel
    with device:
        tower = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return tower.to(device=device, dtype=dtype).eval().requires_grad_(False)


def patches(config: Any) -> int:
    """P: patch features of a picture."""
    return int((config.image_size // config.patch_size) ** 2)


def picture_flops(config: Any) -> float:
    """Operations of a picture's way through the tower, from pixels to its last hidden state."""
    seen = patches(config) + (1 if isinstance(config, CLIPVisionConfig) else 0)  # CLIP has a CLS token
    width, inner = config.hidden_size, config.intermediate_size
    layer = 2 * seen * (4 * width * width + 2 * width * inner) + 4 * seen * seen * width
    return 2.0 * patches(config) * 3 * config.patch_size**2 * width + config.num_hidden_layers * layer


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What a row of the token table is on average: tokens, of which supervised, and patches of its picture."""

    tokens: float
    supervised: float
    patches: int
    width: int


def row_flops(config: Any, row: RowFacts, *, train_all: bool) -> float:
    """Operations that training needs for a row, without the vision tower.

    Forward once; backward once for what flows through, once more for weights that train. A linear projector always trains.
    """
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, queries, keys = config.hidden_size, heads * head, config.num_key_value_heads * head
    weights = width * (2 * queries + 2 * keys) + 3 * width * config.intermediate_size
    attention = 4 * queries * row.tokens / 2  # scores and their product with the values, half of each
    layers = config.num_hidden_layers * row.tokens * (2 * weights + attention)
    head_flops = 2 * row.supervised * width * config.vocab_size
    projector = 2 * row.patches * row.width * width
    language = config.num_hidden_layers * row.tokens * 2 * weights + head_flops
    return 2 * (layers + head_flops) + (language if train_all else 0) + 2 * projector + (projector if train_all else 0)
