"""What Transformers' LLaVA has a place for, asked before training as well as before an export.

Its language model is the backbone of a causal one and a plain projection to the vocabulary: whatever else a family does to its
logits must fit into that matrix, as a constant factor does (Granite, Cohere), or is lost.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from pipeline.core import PipelineError
from pipeline.vlm.model.roles import backbone, backbone_name, output_head

# Our projector's place in the nn.Sequential -> its name in the class it is exported to.
LAYERS: dict[str, dict[str, str]] = {
    "linear": {"0": "linear_1"},
    "mlp": {"0": "linear_1", "2": "linear_2"},
    "norm_mlp": {"0": "projector_layernorm", "1": "linear_1", "3": "linear_2"},
}
BIASLESS = "linear_nobias"  # the projector that Idefics3 has
CAPS = ("final_logit_softcapping", "logits_soft_cap", "final_logit_softcap")  # where configurations keep one


def require_place(kind: str, *, family: str, has_cls: bool, layer: int, layers: int) -> None:
    """Raises `PipelineError` where LLaVA has no place for a projector of this kind behind this hidden state of a `family` tower."""
    if kind not in LAYERS:
        raise PipelineError(
            f"Transformers' LLaVA has no place for a projector of kind {kind}",
            where="projector.kind",
            remedy="train with projector.kind: mlp",
        )
    if has_cls:
        return
    if kind == "norm_mlp":
        raise PipelineError(
            "VipLlava, the only class with a LayerNorm first, drops an encoder's first token, and this encoder has no CLS token",
            where="projector.kind",
            remedy="train with projector.kind: mlp, or a CLIP encoder",
        )
    if layer == -1:
        raise PipelineError(
            f"the last hidden state of a {family} has passed a LayerNorm that LLaVA leaves out",
            where="vision.layer",
            remedy=f"train with vision.layer: {layers} (before that LayerNorm) or -2",
        )


def require_idefics3(kind: str, merging: tuple[str, int], *, family: str, layer: int, grid: int) -> None:
    """Raises `PipelineError` where Idefics3, the class for merged patches, has no place for this projector and encoder.

    Args:
        merging: `projector.merge` and `projector.factor`.
        grid: patches of a picture's side.
    """
    problem = where = remedy = ""
    if not family.startswith("siglip"):
        problem = (
            f"Idefics3, the class for merged patches, takes a SigLIP encoder, this is a {family.removesuffix('_vision_model')}"
        )
        where, remedy = "vision.model", "train with a SigLIP encoder, or with projector.merge: none, projector.factor: 1"
    elif merging[0] == "pool":
        problem, where, remedy = (
            "no class pools patches before its projector",
            "projector.merge",
            "train with projector.merge: shuffle",
        )
    elif kind != BIASLESS:
        problem = f"Idefics3, the class for merged patches, has one matrix without bias, not a {kind} projector"
        where, remedy = "projector.kind", f"train with projector.kind: {BIASLESS}"
    elif layer != -1:
        problem, where, remedy = "Idefics3 takes the last hidden state only", "vision.layer", "train with vision.layer: -1"
    elif _positions(grid) != list(range(grid)):
        problem = f"Idefics3 would give two rows of a {grid} × {grid} grid one position: it rounds"
        where, remedy = "vision.model", "train with another picture size, such as 14, 16, 24, 27 or 32 patches a side"
    if problem:
        raise PipelineError(problem, where=where, remedy=remedy)


def _positions(grid: int) -> list[int]:
    """Where Idefics3 thinks that the rows of a whole picture are: it looks fractions up between rounded boundaries."""
    boundaries = torch.arange(1 / grid, 1.0, 1 / grid)
    fractions = torch.arange(grid, dtype=torch.float32) * (1.0 / torch.tensor([grid]))
    found: list[int] = torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True).tolist()
    return found


def out_of_place(language_model: PreTrainedModel) -> str:
    """What of a language model, with or without weights, LLaVA has no place for; empty where it has one for all."""
    name, config = type(language_model).__name__, language_model.config
    try:
        inner, own, head = backbone_name(language_model), backbone(language_model), output_head(language_model)
    except ValueError as error:
        return str(error)
    if head.bias is not None:
        return f"LLaVA has no place for the bias of {name}'s vocabulary projection"
    for key, _ in language_model.named_parameters():
        if not key.startswith(f"{inner}.") and language_model.get_parameter(key) is not head.weight:
            return f"LLaVA has no place for {key} of {name}"
    if cap := next((getattr(config, key) for key in CAPS if getattr(config, key, None)), None):
        return f"{name} caps its logits at {cap:g}, which LLaVA leaves out"
    return _built_otherwise(own, config) or _without_cache(own)


def _without_cache(own: Any) -> str:
    """Whether the backbone keeps its state elsewhere than LLaVA, which hands a cache on, looks for it."""
    weight = next(own.parameters())
    width: int = own.get_input_embeddings().weight.shape[1]
    try:
        with torch.no_grad():
            found = own(inputs_embeds=weight.new_zeros(1, 4, width), use_cache=False)
    except Exception:  # without weights some ask for numbers that are not there
        return ""
    return "" if hasattr(found, "past_key_values") else f"a {type(own).__name__} has no cache of keys and values"


def _built_otherwise(own: Any, config: Any) -> str:
    """Whether Transformers would put another class in LLaVA's place for the backbone than the one that is trained."""
    try:
        with torch.device("meta"):
            other: nn.Module = AutoModel.from_config(config)
    except Exception:  # a family without a backbone of its own
        return f"Transformers cannot build the backbone of a {config.model_type} alone"
    ours, theirs = ({key: tuple(t.shape) for key, t in module.state_dict().items()} for module in (own, other))
    return "" if ours == theirs else f"LLaVA would hold a {type(other).__name__} instead of a {type(own).__name__}"
