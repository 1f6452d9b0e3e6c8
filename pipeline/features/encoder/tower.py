"""The vision tower of any CLIP or SigLIP checkpoint in Transformers' format."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionModel
from transformers.activations import QuickGELUActivation

from pipeline.core import ARTEFACT, PipelineError
from pipeline.core.loading import load_pretrained, unloadable

TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}


class InPlaceQuickGelu(QuickGELUActivation):
    """As Transformers computes it, bit for bit, in one piece of fresh memory instead of three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1.702 * x).sigmoid_().mul_(x)


def load_tower(model: str, revision: str, attention: str = "sdpa") -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unloadable(model, error, where="vision.model") from None
    family = TOWERS.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(TOWERS))
        raise PipelineError(f"{model} is a {config.model_type} model, expected one of {known}", remedy="set vision.model")
    tower, info = load_pretrained(
        family, model, where="vision.model", revision=revision, dtype=torch.float32, attn_implementation=attention
    )
    if info["missing_keys"]:
        raise PipelineError(f"{model} lacks weights: {sorted(info['missing_keys'])[0]} and others", code=ARTEFACT)
    skip_pooling(tower)
    for module in tower.modules():
        for name, child in module.named_children():
            if isinstance(child, QuickGELUActivation):
                setattr(module, name, InPlaceQuickGelu())
    return tower


def skip_pooling(tower: PreTrainedModel) -> None:
    """Leave a head that makes one vector of all patches (SigLIP's) uncomputed: patch features do not pass it. It keeps its weights,
    which an export needs."""
    module: Any
    for module in tower.modules():
        if hasattr(module, "use_head"):
            module.use_head = False


def keep_layers(tower: PreTrainedModel, count: int) -> None:
    """Leave out the layers whose output nobody asks for: LLaVA's -2 would compute the last one in vain."""
    stack: Any = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    del stack[max(1, count) :]
    tower.config.num_hidden_layers = len(stack)
