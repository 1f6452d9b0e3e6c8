"""The vision tower of a checkpoint in Transformers' format: families whose tokens are a plain grid of patches.

Whatever stands beside the patches (a CLS token, registers) stands before them, so patch features are the last P tokens.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    Aimv2VisionModel,
    AutoConfig,
    ChineseCLIPVisionModel,
    CLIPVisionModel,
    DeiTModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    IJepaModel,
    MetaClip2VisionModel,
    MLCDVisionModel,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)
from transformers.activations import QuickGELUActivation

from pipeline.core import ARTEFACT, PipelineError
from pipeline.core.loading import load_pretrained, read_pretrained

TOWERS: dict[str, type[PreTrainedModel]] = {
    "aimv2": Aimv2VisionModel,
    "aimv2_vision_model": Aimv2VisionModel,
    "chinese_clip": ChineseCLIPVisionModel,
    "chinese_clip_vision_model": ChineseCLIPVisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "deit": DeiTModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
    "ijepa": IJepaModel,
    "metaclip_2": MetaClip2VisionModel,
    "metaclip_2_vision_model": MetaClip2VisionModel,
    "mlcd": MLCDVisionModel,
    "mlcd_vision_model": MLCDVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "vit": ViTModel,
}
# Their positions fit any size of picture, so the side is what the checkpoint's preprocessor makes: DINOv2's config says 518,
# its preprocessor 224.
ANY_SIZE = {"dinov2", "dinov2_with_registers", "dinov3_vit"}
# Their class has a head over the CLS token, whose weights many checkpoints lack.
WITH_POOLER = {"vit", "deit", "ijepa"}
REFUSED = {
    "siglip2": "takes packed patches of any shape (NaFlex); a SigLIP2 of fixed size works, such as siglip2-base-patch16-224",
    "swin": "merges patches from layer to layer",
    "swinv2": "merges patches from layer to layer",
    "hiera": "merges patches from layer to layer",
    "dinov3_convnext": "is convolutional",
}


class InPlaceQuickGelu(QuickGELUActivation):
    """As Transformers computes it, bit for bit, in one piece of fresh memory instead of three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:  # gradients need what would be written over
            return super().forward(x)
        return (1.702 * x).sigmoid_().mul_(x)


def load_tower(model: str, revision: str, attention: str = "sdpa") -> PreTrainedModel:
    config = read_pretrained(AutoConfig, model, where="vision.model", revision=revision)
    family = tower_class(model, config.model_type)
    shape = getattr(config, "vision_config", config)
    for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers"):
        if type(value := getattr(shape, key, None)) is not int or value < 1:
            raise PipelineError(f"config.json: {key} is {value!r:.40}, expected a whole number", where=model, code=ARTEFACT)
    options: dict[str, Any] = {"add_pooling_layer": False} if config.model_type in WITH_POOLER else {}
    options |= {"revision": revision, "dtype": torch.float32, "attn_implementation": attention}
    tower, info = load_pretrained(family, model, where="vision.model", **options)
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


def tower_class(model: str, kind: str) -> type[PreTrainedModel]:
    """The vision tower's class of a `model_type`; raises `PipelineError` for one that gives no plain grid of patches."""
    if kind in TOWERS:
        return TOWERS[kind]
    known = ", ".join(sorted(name for name in TOWERS if not name.endswith("_vision_model")))
    reason = REFUSED.get(kind.removesuffix("_vision_model"), f"is none of {known}")
    raise PipelineError(f"{model} is a {kind} model, which {reason}", where="vision.model", remedy="set vision.model")


def side_of(config: Any, made: tuple[int, int], model: str) -> int:
    """Pixels of a picture's side, from the tower's config and what the preprocessor makes (height, width).

    Raises `PipelineError` where the two do not fit.
    """
    side, patch = (made[0], config.patch_size) if config.model_type in ANY_SIZE else (config.image_size, config.patch_size)
    if made != (side, side):
        problem = f"makes pictures of {made[0]} x {made[1]} pixels, the tower takes {side}"
    elif side % patch and config.model_type in ANY_SIZE:
        problem = f"makes pictures of {side} pixels, which patches of {patch} do not divide"
    else:
        return int(side)
    remedy = "mend that file, or set vision.model"
    raise PipelineError(f"preprocessor_config.json {problem}", where=model, remedy=remedy, code=ARTEFACT)


def keep_layers(tower: PreTrainedModel, count: int) -> None:
    """Leave out the layers whose output nobody asks for: LLaVA's -2 would compute the last one in vain."""
    stack: Any = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    del stack[max(1, count) :]
    tower.config.num_hidden_layers = len(stack)
