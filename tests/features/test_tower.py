"""What the vision tower computes otherwise than Transformers: nothing."""

from pathlib import Path

import pytest
import torch
from conftest import CPU
from transformers import SiglipVisionModel
from transformers.activations import QuickGELUActivation
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.tower import InPlaceQuickGelu


def test_quick_gelu_in_place_has_the_bits_of_transformers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1000, dtype=dtype)
        assert torch.equal(InPlaceQuickGelu()(x), QuickGELUActivation()(x))


def test_siglips_pooling_is_not_computed_and_its_weights_stay(
    vision_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features have the same bits with and without, a digest of the weights too: a store that was made with it is still known."""
    calls = []
    plain = SiglipMultiheadAttentionPoolingHead.forward
    monkeypatch.setattr(SiglipMultiheadAttentionPoolingHead, "forward", lambda self, states: calls.append(1) or plain(self, states))
    without = Encoder(str(vision_folders["siglip"]), precision="float32", device=CPU, batch=4)
    pooled = Encoder(str(vision_folders["siglip"]), precision="float32", device=CPU, batch=4)
    pooled.tower.use_head = True
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    rows = without.encode_rows(pixels, list("0123"))
    assert not calls
    assert torch.equal(pooled.encode_rows(pixels, list("0123")), rows)
    assert calls, "or this compares nothing"
    assert without.tower.state_dict().keys() == SiglipVisionModel.from_pretrained(vision_folders["siglip"]).state_dict().keys()
