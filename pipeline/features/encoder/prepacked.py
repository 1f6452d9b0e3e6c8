"""Matrix products of a frozen model on a CPU in bfloat16: weights laid out once, the activation computed in the same pass.

`nn.Linear` has oneDNN lay the weights out anew in every call, and writes and reads the whole hidden layer again for the
activation. The operations are those that torch.compile puts into frozen models on CPUs.
"""

import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation

QUICK = 1.702  # QuickGELU(x) = x * sigmoid(1.702 x) = swish(1.702 x) / 1.702


class InPlaceQuickGelu(QuickGELUActivation):
    """As Transformers computes it, bit for bit, in one piece of fresh memory instead of three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (QUICK * x).sigmoid_().mul_(x)


ACTIVATIONS: dict[type[nn.Module], tuple[str, str]] = {  # oneDNN's name, and its kind
    QuickGELUActivation: ("swish", ""),
    InPlaceQuickGelu: ("swish", ""),
    GELUTanh: ("gelu", "tanh"),
    GELUActivation: ("gelu", "none"),
    nn.GELU: ("gelu", "none"),
}


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """On CPUs in bfloat16, where this build of torch has oneDNN."""
    operations = torch.ops.mkldnn
    has = hasattr(operations, "_linear_pointwise") and hasattr(operations, "_reorder_linear_weight")
    return device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and has


def prepack(tower: nn.Module, rows: int) -> None:
    """Replace every `nn.Linear` of a frozen tower, called with `rows` rows in all, and the activations between them."""
    for module in list(tower.modules()):
        first, second = getattr(module, "fc1", None), getattr(module, "fc2", None)
        activation: nn.Module = getattr(module, "activation_fn", module)
        if isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and type(activation) in ACTIVATIONS:
            scale = QUICK if isinstance(activation, QuickGELUActivation) else 1.0
            module.fc1 = PrepackedLinear(first, rows, scale=scale, activation=ACTIVATIONS[type(activation)])
            module.fc2 = PrepackedLinear(second, rows, scale=1 / scale, scale_bias=False)
            module.activation_fn = nn.Identity()
    for module in list(tower.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PrepackedLinear(child, rows))


class PrepackedLinear(nn.Module):
    """activation(x @ (scale * weight).T + scale * bias), bfloat16: [..., in] of any float dtype -> [..., out].

    Weights are scaled before they are rounded, so scaling costs no exactness. They are no parameters: nothing trains here.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rows: int,
        *,
        scale: float = 1.0,
        scale_bias: bool = True,
        activation: tuple[str, str] = ("none", ""),
    ) -> None:
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight((weight * scale).to(torch.bfloat16), rows)
        self._bias = None if bias is None else (bias.detach() * (scale if scale_bias else 1.0)).to(torch.bfloat16)
        self._activation, self._kind = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self._weight, self._bias, self._activation, [], self._kind)
