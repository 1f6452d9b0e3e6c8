"""Prepacked products compute what nn.Linear and its activation do, no further from float32 than autocast does."""

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation

from pipeline.features.encoder.prepacked import InPlaceQuickGelu, PrepackedLinear, can_prepack, prepack

BFLOAT16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not can_prepack(torch.device("cpu"), BFLOAT16), reason="torch without oneDNN")


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(48, 64)
        self.fc1, self.fc2, self.activation_fn = nn.Linear(64, 256), nn.Linear(256, 64, bias=False), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(self.before(x))))


@pytest.mark.parametrize("kind", [QuickGELUActivation, InPlaceQuickGelu, GELUTanh, GELUActivation, nn.GELU, nn.ReLU])
def test_no_further_from_float32_than_autocast(kind: type[nn.Module]) -> None:
    model, x = Mlp(kind()), torch.randn(3, 17, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", BFLOAT16):
            rounded = model(x)
        prepack(model, 3 * 17)
        found = model(x)
    assert found.dtype == BFLOAT16
    assert all(isinstance(layer, PrepackedLinear) for layer in (model.before, model.fc1, model.fc2))
    assert isinstance(model.activation_fn, nn.Identity) == (kind is not nn.ReLU)
    assert (found - exact).norm() <= 1.2 * (rounded - exact).norm()
    assert (found - exact).norm() < 0.02 * exact.norm()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, x = Mlp(QuickGELUActivation()), torch.randn(8, 17, 48)
    with torch.inference_mode():
        prepack(model, 8 * 17)
        one, other = model(x), model(x.flip(0)).flip(0)
    assert torch.equal(one, other)


def test_quick_gelu_in_place_has_the_bits_of_transformers() -> None:
    for dtype in (torch.float32, BFLOAT16):
        x = torch.randn(1000, dtype=dtype)
        assert torch.equal(InPlaceQuickGelu()(x), QuickGELUActivation()(x))


def test_only_where_it_can_be_done() -> None:
    assert not can_prepack(torch.device("cuda"), BFLOAT16)
    assert not can_prepack(torch.device("cpu"), torch.float32)
