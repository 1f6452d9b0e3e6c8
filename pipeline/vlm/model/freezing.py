"""What trains and what does not: the one place that touches `requires_grad`, and checksums that prove it."""

from collections.abc import Iterable

import torch
import xxhash

from pipeline.vlm.model.roles import decoder_layers
from pipeline.vlm.model.sharding import full_tensor
from pipeline.vlm.model.vlm import VisionLanguageModel


def frozen_digest(model: VisionLanguageModel) -> str:
    """Checksum of every parameter that does not train: equal before and after training, or something else wrote to it."""
    return weights_digest(p for p in model.parameters() if not p.requires_grad)


def weights_digest(parameters: Iterable[torch.Tensor]) -> str:
    """Checksum of tensors' bytes, in order."""
    found = xxhash.xxh3_128()
    for parameter in parameters:
        found.update(full_tensor(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def cast_frozen(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Give the language model's parameters that do not train another number format; its buffers and the others keep theirs."""
    for parameter in model.language_model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def freeze(model: VisionLanguageModel, train: str) -> dict[str, int]:
    """Set what trains: `projector`, `projector+ends` (first and last decoder layer too) or `all`; returns counts by part.

    The one place that touches `requires_grad`.
    """
    language_model = model.language_model
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if train == "all":
        language_model.requires_grad_(True)
    elif train == "projector+ends":
        layers = decoder_layers(language_model)
        layers[0].requires_grad_(True)
        layers[-1].requires_grad_(True)
    is_mixture = getattr(language_model.config, "router_aux_loss_coef", None) is not None
    model.router_trains = is_mixture and train != "projector"
    return {
        "projector": sum(p.numel() for p in model.projector.parameters() if p.requires_grad),
        "language_model": sum(p.numel() for p in language_model.parameters() if p.requires_grad),
        "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
    }
