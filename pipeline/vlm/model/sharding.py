"""A model whose weights, gradients and optimiser states are sharded over processes (FSDP2, arXiv 2304.11277).

Every layer's weights are gathered when it runs and dropped after, so a model need not fit on one device to train. All
processes must run the same number of pieces: gathering is something that they do together.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

M = TypeVar("M", bound=torch.nn.Module)


def shard_model(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> None:
    """Shard in place: a group for each decoder layer, one for the rest, where tied weights stay together."""
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


def sync_gradients(model: torch.nn.Module, on: bool) -> None:
    """Whether the next backward pass sums gradients over processes; until then each keeps its own, whole."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(on)


def reshard(model: torch.nn.Module) -> None:
    """Drop what a forward pass without a backward one has left gathered, so that parameters are parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Within, what is no decoder layer is whole, so that parts of the model can run by themselves; layers gather their own."""
    if isinstance(model, FSDPModule):
        model.unshard()
    yield
    if isinstance(model, FSDPModule):
        reshard(model)


def gather_weights(sharded: M, fresh: M) -> M:
    """`fresh`, the model that training began with, now with the weights that trained: whole, to save and to measure."""
    with torch.no_grad():
        for trained, parameter in zip(sharded.parameters(), fresh.parameters(), strict=True):
            if trained.requires_grad:
                parameter.copy_(full_tensor(trained.detach()))
    return fresh


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every process; all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all have whole, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor) or not tensor.ndim:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
