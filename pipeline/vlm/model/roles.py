"""A language model's parts by what they do: families name them differently, and not every family has Transformers' accessors."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def backbone_name(language_model: PreTrainedModel) -> str:
    """The name of the part that turns embeddings into hidden states: the child that holds the token embeddings."""
    table = language_model.get_input_embeddings()
    for name, child in language_model.named_children():
        if child is not table and any(module is table for module in child.modules()):
            return name
    raise ValueError(f"{type(language_model).__name__} has no part that holds its token embeddings")


def backbone(language_model: PreTrainedModel) -> Any:
    """That part; its output has `last_hidden_state` [B, T, D]."""
    return getattr(language_model, backbone_name(language_model))


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The stack of layers: of the lists of modules that are in no other, the one with most parameters."""
    stacks, inside = list[nn.ModuleList](), set[nn.Module]()
    for module in backbone(language_model).modules():  # outer ones come first
        if isinstance(module, nn.ModuleList) and module not in inside:
            stacks.append(module)
            inside.update(module.modules())
    if not stacks:
        raise ValueError(f"{type(language_model).__name__} has no stack of layers")
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))


def output_head(language_model: PreTrainedModel) -> nn.Linear:
    """The projection to the vocabulary: Transformers' accessor, else the one linear map outside the backbone to as many rows."""
    head = language_model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        return head
    table: Any = language_model.get_input_embeddings()
    name = backbone_name(language_model)
    found = [
        module
        for key, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == table.num_embeddings and not key.startswith(f"{name}.")
    ]
    if len(found) != 1:
        raise ValueError(f"{type(language_model).__name__} has no projection to its vocabulary")
    return found[0]
