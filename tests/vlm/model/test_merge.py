"""Token merging: what shuffle and pool compute, with gradients, and a checkpoint that keeps it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HIDDEN, PATCHES, WIDTH, World
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from pipeline.core.errors import PipelineError
from pipeline.core.grid import merged_tokens
from pipeline.export.source import Source
from pipeline.minimind.projector import to_minimind
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.merge import Pool, Shuffle
from pipeline.vlm.model.projector import PROJECTORS, build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

MERGES = [("shuffle", 2), ("shuffle", 3), ("shuffle", 4), ("pool", 2), ("pool", 3), ("pool", 4)]


def reference(features: torch.Tensor, merge: str, factor: int) -> torch.Tensor:
    """One block after the other, one patch after the other."""
    side = round(features.shape[1] ** 0.5)
    merged = []
    for image in features:
        for top in range(0, side, factor):
            for left in range(0, side, factor):
                block = [image[(top + i) * side + left + j] for i in range(factor) for j in range(factor)]
                merged.append(torch.cat(block) if merge == "shuffle" else torch.stack(block).mean(0))
    return torch.stack(merged).view(len(features), -1, merged[0].shape[-1])


@pytest.mark.parametrize(("merge", "factor"), MERGES)
def test_merging_and_its_gradient_equal_a_plain_reference(merge: str, factor: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 144, 5, dtype=torch.float64, requires_grad=True)
    again = features.detach().clone().requires_grad_()
    merged, expected = {"shuffle": Shuffle, "pool": Pool}[merge](factor)(features), reference(again, merge, factor)
    assert merged.shape[1] == merged_tokens(144, factor)
    assert torch.equal(merged, expected) if merge == "shuffle" else torch.allclose(merged, expected, atol=1e-14)
    weight = torch.randn_like(merged)
    (merged * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(features.grad, again.grad, atol=1e-14)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_shuffled_image_has_its_channels_where_idefics3_has_them(factor: int) -> None:
    config = Idefics3Config(scale_factor=factor, vision_config={"hidden_size": 16}, text_config={"hidden_size": 64})
    features = torch.randn(2, 144, 16)
    assert torch.equal(Shuffle(factor)(features), Idefics3Connector(config).pixel_shuffle(features, factor))


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize(("merge", "factor"), [("shuffle", 2), ("pool", 4)])
def test_every_projector_takes_merged_patches_under_the_same_names(kind: str, merge: str, factor: int) -> None:
    projector = build_projector(kind, WIDTH, HIDDEN, merge, factor)
    assert list(projector.state_dict()) == list(build_projector(kind, WIDTH, HIDDEN).state_dict())
    features = torch.randn(2, PATCHES, WIDTH)
    layers = torch.nn.Sequential(*list(projector)[1:])
    assert torch.equal(projector(features), layers(reference(features, merge, factor)))


@pytest.mark.parametrize("merge", ["none", "shuffle", "pool"])
def test_factor_one_merges_nothing(merge: str) -> None:
    assert len(build_projector("mlp", WIDTH, HIDDEN, merge, 1)) == len(build_projector("mlp", WIDTH, HIDDEN))


@pytest.mark.parametrize(
    ("patches", "factor", "remedy"), [(27 * 27, 2, "1 or 3"), (14 * 14, 4, "1 or 2"), (7 * 7, 2, "none"), (48, 2, "none")]
)
def test_a_factor_that_does_not_divide_the_grid_is_refused_with_those_that_do(patches: int, factor: int, remedy: str) -> None:
    with pytest.raises(PipelineError, match=r"projector\.factor") as caught:
        merged_tokens(patches, factor)
    assert remedy in caught.value.line()


def test_features_of_another_grid_are_refused_and_never_cut() -> None:
    with pytest.raises(ValueError, match="15 patches"):
        Pool(2)(torch.zeros(1, 15, 4))


@pytest.mark.parametrize(("merge", "factor"), [("shuffle", 2), ("pool", 4)])
def test_a_checkpoint_keeps_its_merging(world: World, tmp_path: Path, merge: str, factor: int) -> None:
    projector = build_projector("mlp", WIDTH, HIDDEN, merge, factor)
    model = VisionLanguageModel(projector, world.model().language_model)
    shape = {"kind": "mlp", "width": WIDTH, "hidden": HIDDEN, "merge": merge, "factor": factor}
    vision = {"model": world.clip.name, "revision": "", "layer": -1, "precision": "float32", "spec": world.clip.spec()}
    llm = {"model": str(world.llm), "revision": "", "image_token": "<image>"}
    checkpoint.save(tmp_path / "m", model, Manifest(vision, llm, shape, own_llm=False), world.builder)
    again, manifest = checkpoint.load(tmp_path / "m")
    features = torch.randn(2, PATCHES, WIDTH)
    assert manifest.merging == (merge, factor)
    assert torch.equal(again.projector(features), projector(features))


def test_an_old_checkpoint_that_says_nothing_of_merging_has_none() -> None:
    assert Manifest({}, {}, {"kind": "mlp", "width": 4, "hidden": 4}, own_llm=False).merging == ("none", 1)


def test_exports_refuse_by_name_what_they_have_no_place_for() -> None:
    def source(merging: dict[str, object], **spec: object) -> Source:
        manifest = Manifest({"spec": {"config": {}} | spec}, {}, {"kind": "mlp"} | merging, own_llm=True)
        return Source(Path(), manifest, SimpleNamespace())  # type: ignore[arg-type]

    for refused, remedy in (
        (source({"merge": "pool", "factor": 2}), r"projector\.merge: none"),
        (source({}, pool=2), r"vision\.pool: 1"),
        (source({}, config={"family": "dinov2"}), "CLIP or SigLIP"),
    ):
        with pytest.raises(PipelineError, match=remedy):
            refused.check_vision("Transformers' LLaVA")
    source({}).check_vision("Transformers' LLaVA")
    with pytest.raises(PipelineError, match=r"projector\.merge: none"):
        to_minimind(build_projector("mlp", WIDTH, HIDDEN, "pool", 2), "mlp")
