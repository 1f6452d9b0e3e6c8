"""MiniMind-V's `vision_proj` <-> this project's projector.

linear      vision_proj.vision_proj.0           Linear (2025)
mlp         vision_proj.mlp.0 and .2            Linear, GELU, Linear (March and April 2026)
norm_mlp    vision_proj.mlp.0, .1 and .3        LayerNorm first (since)
Numbers are those of the layers in our `build_projector`, so only the prefix changes. `mlp` has GELU's tanh form here, the exact
one in MiniMind-V: outputs differ in the fourth digit.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.core import ARTEFACT, PipelineError
from pipeline.minimind.convert import Tensors
from pipeline.vlm.model import build_projector

PREFIXES = {"linear": "vision_proj.vision_proj.", "mlp": "vision_proj.mlp.", "norm_mlp": "vision_proj.mlp."}
OURS, TOWER = "vision_proj.", "vision_encoder."
READERS = {("linear", 2025): "of 2025", ("mlp", 2026): "of March and April 2026", ("norm_mlp", 2026): "since April 2026"}


@dataclass(frozen=True, slots=True)
class Projector:
    """kind, width (Dv), hidden (D) and the tensors by our names."""

    kind: str
    width: int
    hidden: int
    tensors: Tensors

    def module(self) -> nn.Sequential:
        """Our projector holding these weights, float32."""
        built = build_projector(self.kind, self.width, self.hidden)
        built.load_state_dict({name: tensor.float() for name, tensor in self.tensors.items()}, strict=True)
        return built


def split(tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Tensors of the language model, of the projector and of the vision tower."""
    projector = {name: tensor for name, tensor in tensors.items() if name.startswith(OURS)}
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
    return {name: t for name, t in tensors.items() if name not in projector and name not in tower}, projector, tower


def read_projector(tensors: Tensors, hidden: int, *, where: str) -> Projector:
    """The projector in tensors named `vision_proj.*`, beside a language model of width `hidden`.

    Raises `PipelineError` naming a tensor that is missing, unknown or misshapen.
    """
    linear = f"{PREFIXES['linear']}0.weight" in tensors
    first = f"{PREFIXES['linear' if linear else 'mlp']}0.weight"
    if first not in tensors:
        found = next(iter(tensors))
        raise PipelineError(f"holds no {first}, but {found}: no projector of MiniMind-V", where=where, code=ARTEFACT)
    kind = "linear" if linear else "norm_mlp" if tensors[first].ndim == 1 else "mlp"
    prefix, width = PREFIXES[kind], tensors[first].shape[-1] if tensors[first].ndim else 1
    with torch.device("meta"):
        expected = {f"{prefix}{name}": tensor for name, tensor in build_projector(kind, width, hidden).state_dict().items()}
    for name in [*tensors, *expected]:
        if name not in expected or name not in tensors:
            problem = "missing" if name in expected else "unknown"
            raise PipelineError(f"{problem} tensor {name} in a {kind} projector", where=where, code=ARTEFACT)
        if tensors[name].shape != expected[name].shape:
            shapes = f"{list(tensors[name].shape)} where {list(expected[name].shape)} is expected"
            raise PipelineError(f"{name} is {shapes} of a {kind} projector", where=where, code=ARTEFACT)
    return Projector(kind, width, hidden, {name.removeprefix(prefix): tensor.contiguous() for name, tensor in tensors.items()})


def to_minimind(projector: nn.Sequential, kind: str) -> Tensors:
    """Our projector's tensors by MiniMind-V's names; raises `PipelineError` for a kind that MiniMind-V never had."""
    if "merge" in dict(projector.named_children()):
        remedy = "train with projector.merge: none, projector.factor: 1"
        raise PipelineError("MiniMind-V has no projector that merges patches", where="projector.merge", remedy=remedy)
    if kind not in PREFIXES:
        remedy = f"train with projector.kind: {', '.join(PREFIXES)}"
        raise PipelineError(f"MiniMind-V has no projector of kind {kind}", where="projector.kind", remedy=remedy)
    return {f"{PREFIXES[kind]}{name}": tensor for name, tensor in projector.state_dict().items()}
