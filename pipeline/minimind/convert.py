"""MiniMind's tensors <-> those of the Transformers class that computes the same, exactly.

Dense models: the same names. Mixtures: Transformers stacks the experts of a layer, gate rows before up rows.

The mixture of 2025 adds its shared experts to the routed ones as they are, Qwen2-MoE multiplies its own by sigmoid(w·x). With
w = 0 that is one half, so its shared expert holds MiniMind's with the last projection doubled: exact in binary.
"""

import torch

from pipeline.core import ARTEFACT, PipelineError
from pipeline.minimind.layout import EMBEDDING, HEAD, Layout

PARTS = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


def to_transformers(tensors: Tensors, layout: Layout) -> Tensors:
    """State of the Transformers model, the projection left out where it is tied; `tensors` must fit the layout."""
    state = {name: tensor for name, tensor in tensors.items() if name != HEAD or not layout.tied}
    for i in range(layout.layers if layout.experts else 0):
        mlp = f"model.layers.{i}.mlp."
        gate, up, down = ([state.pop(f"{mlp}experts.{e}.{part}.weight") for e in range(layout.experts)] for part in PARTS)
        state[f"{mlp}experts.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)  # [E, 2 × F, D]
        state[f"{mlp}experts.down_proj"] = torch.stack(down)  # [E, D, F]
        if layout.shared:
            gate, up, down = ([state.pop(f"{mlp}shared_experts.{e}.{part}.weight") for e in range(layout.shared)] for part in PARTS)
            state[f"{mlp}shared_expert.gate_proj.weight"] = torch.cat(gate)
            state[f"{mlp}shared_expert.up_proj.weight"] = torch.cat(up)
            state[f"{mlp}shared_expert.down_proj.weight"] = 2 * torch.cat(down, dim=1)
            state[f"{mlp}shared_expert_gate.weight"] = gate[0].new_zeros(1, layout.hidden)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def from_transformers(state: Tensors, layout: Layout, *, where: str) -> Tensors:
    """MiniMind's tensors in MiniMind's order, the projection included; what has no place in the layout stays, at the end.

    Raises `PipelineError` when the gate of a shared expert has trained, since MiniMind has none.
    """
    left = dict(state)
    if layout.tied:
        left[HEAD] = left[EMBEDDING]
    for i in range(layout.layers if layout.experts else 0):
        mlp = f"model.layers.{i}.mlp."
        gate_up, down = left.pop(f"{mlp}experts.gate_up_proj"), left.pop(f"{mlp}experts.down_proj")
        gate, up = gate_up.chunk(2, dim=1)
        _spread(left, f"{mlp}experts.", gate.unbind(), up.unbind(), down.unbind())
        if layout.shared:
            if left.pop(f"{mlp}shared_expert_gate.weight").any():
                raise PipelineError(
                    f"{mlp}shared_expert_gate.weight has trained and MiniMind's layout has no such gate",
                    where=where,
                    remedy="keep this model in Transformers' format",
                    code=ARTEFACT,
                )
            gate, up, down = (left.pop(f"{mlp}shared_expert.{part}.weight") for part in PARTS)
            size = layout.intermediate
            _spread(left, f"{mlp}shared_experts.", gate.split(size), up.split(size), (down / 2).split(size, dim=1))
    ordered = {name: left.pop(name).contiguous() for name in layout.shapes() if name in left}
    return ordered | left


def _spread(left: Tensors, prefix: str, *parts: tuple[torch.Tensor, ...]) -> None:
    for part, tensors in zip(PARTS, parts, strict=True):
        left |= {f"{prefix}{number}.{part}.weight": tensor for number, tensor in enumerate(tensors)}
