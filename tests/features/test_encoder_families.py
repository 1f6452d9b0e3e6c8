"""Encoder families: patch features are the tower's own, in the grid's order, whatever stands before them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from transformers import CLIPImageProcessorPil, PreTrainedModel

from pipeline.core import PipelineError, fingerprint
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.tower import ANY_SIZE, TOWERS

SIDE, PATCH, WIDTH = 32, 8, 32
PATCHES = (SIDE // PATCH) ** 2
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
    "initializer_range": 0.2,
}  # fmt: skip
WIDE: dict[str, Any] = {"intermediate_size": 48}
CONFIGS = {
    "aimv2_vision_model": t.Aimv2VisionConfig(**SHAPE, **WIDE),
    "chinese_clip_vision_model": t.ChineseCLIPVisionConfig(**SHAPE, **WIDE),
    "clip_vision_model": t.CLIPVisionConfig(**SHAPE, **WIDE),
    "deit": t.DeiTConfig(**SHAPE, **WIDE),
    "dinov2": t.Dinov2Config(**SHAPE | {"image_size": 56}),
    "dinov2_with_registers": t.Dinov2WithRegistersConfig(**SHAPE | {"image_size": 56}, num_register_tokens=4),
    "dinov3_vit": t.DINOv3ViTConfig(**SHAPE | {"image_size": 56}, **WIDE, num_register_tokens=4),
    "ijepa": t.IJepaConfig(**SHAPE, **WIDE),
    "metaclip_2_vision_model": t.MetaClip2VisionConfig(**SHAPE, **WIDE),
    "mlcd_vision_model": t.MLCDVisionConfig(**SHAPE, **WIDE),
    "siglip_vision_model": t.SiglipVisionConfig(**SHAPE, **WIDE),
    "vit": t.ViTConfig(**SHAPE, **WIDE),
}
SPELLINGS = {"mlcd": "mlcd_vision_model"}  # the same class under another model_type


def save(folder: Path, config: Any, *, side: int = SIDE) -> PreTrainedModel:
    """A random model of the config's family with a preprocessor that makes pictures of `side` pixels."""
    torch.manual_seed(3)
    tower: PreTrainedModel = TOWERS[config.model_type](config).eval()
    tower.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return tower


def encoder(folder: Path, **options: Any) -> Encoder:
    return Encoder(str(folder), precision="float32", device=torch.device("cpu"), batch=2, **options)


def normalised(made: Encoder, pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels)[None].float() * made.preprocess.rescale - made._mean) / made._std


def test_every_family_is_tried_here() -> None:
    whole = {"aimv2", "chinese_clip", "clip", "metaclip_2", "siglip"}  # a text tower beside: the class finds its own part
    assert set(TOWERS) == set(CONFIGS) | whole | set(SPELLINGS)


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("family", CONFIGS)
def test_features_are_the_towers_own_patch_tokens(family: str, layer: int, tmp_path: Path, png: Callable[[int], bytes]) -> None:
    tower, made = save(tmp_path, CONFIGS[family]), encoder(tmp_path, layer=layer)
    with torch.no_grad():
        seen = tower(normalised(made, made.preprocess(png(1), where="1.png")), output_hidden_states=True)
    expected = seen.last_hidden_state if layer == -1 else seen.hidden_states[layer]
    assert (made.tokens, made.width) == (PATCHES, WIDTH)
    found = made.encode_files([png(1), png(2)], ["1.png", "2.png"])
    assert torch.allclose(found[0].float(), expected[0, -PATCHES:], atol=4e-3, rtol=2e-3)
    assert torch.equal(found[0], made.encode_files([png(1)], ["1.png"])[0]), "a row does not depend on its batch"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_patch_stands_where_the_grid_has_it(family: str, tmp_path: Path) -> None:
    """Before the first layer a token depends on its own patch alone: another patch 6 changes row 6 and no other."""
    save(tmp_path, CONFIGS[family])
    made = encoder(tmp_path, layer=0)
    pixels = torch.full((2, 3, SIDE, SIDE), 90, dtype=torch.uint8)
    pixels[1, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] = 200  # row 1, column 2 of four
    before, after = made.encode(pixels, ["", ""])
    assert [patch for patch in range(PATCHES) if not torch.equal(before[patch], after[patch])] == [6]


@pytest.mark.parametrize("family", sorted(ANY_SIZE))
def test_a_family_of_any_size_takes_what_its_preprocessor_makes(family: str, tmp_path: Path) -> None:
    save(tmp_path / "a", CONFIGS[family], side=48)
    assert encoder(tmp_path / "a").tokens == 36
    save(tmp_path / "b", CONFIGS[family], side=50)
    with pytest.raises(PipelineError, match="makes pictures of 50 pixels, which patches of 8 do not divide"):
        encoder(tmp_path / "b")


def test_registers_and_family_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    for name, registers in (("a", 4), ("b", 4)):
        config = t.DINOv3ViTConfig(**SHAPE, **WIDE, num_register_tokens=registers, rope_theta=100.0 if name == "a" else 90.0)
        save(tmp_path / name, config)
    one, other = (encoder(tmp_path / name).spec() for name in "ab")
    assert fingerprint(one) != fingerprint(other)
    assert one["config"]["family"] == "dinov3_vit"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            t.Siglip2VisionConfig(**{k: v for k, v in SHAPE.items() if k not in ("image_size", "initializer_range")}),
            "packed patches",
        ),
        (
            t.SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2),
            "merges patches from layer to layer",
        ),
        (
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"),
            "is none of aimv2, chinese_clip, clip",
        ),
    ],
)
def test_a_family_without_a_plain_grid_is_refused_with_the_reason(config: Any, reason: str, tmp_path: Path) -> None:
    t.AutoModel.from_config(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match=reason):
        encoder(tmp_path)
