"""What the vision tower computes otherwise than Transformers: nothing."""

import torch
from transformers.activations import QuickGELUActivation

from pipeline.features.encoder.tower import InPlaceQuickGelu


def test_quick_gelu_in_place_has_the_bits_of_transformers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1000, dtype=dtype)
        assert torch.equal(InPlaceQuickGelu()(x), QuickGELUActivation()(x))
