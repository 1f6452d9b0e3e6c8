"""The projector: every kind maps patches one by one, and computes what its name says."""

from typing import get_args

import pytest
import torch
from conftest import HIDDEN, PATCHES, WIDTH
from torch.nn import functional as F

from pipeline.core.errors import PipelineError
from pipeline.params import schema
from pipeline.vlm.model.projector import PROJECTORS, build_projector


def test_params_offer_every_kind_and_no_other() -> None:
    assert set(get_args(schema.Projector.model_fields["kind"].annotation)) == set(PROJECTORS)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_projector_maps_every_patch_by_itself(kind: str) -> None:
    torch.manual_seed(0)
    projector, features = build_projector(kind, WIDTH, HIDDEN + 8), torch.randn(2, PATCHES, WIDTH)
    projected = projector(features)
    assert projected.shape == (2, PATCHES, HIDDEN + 8)
    assert torch.allclose(projected[1, 3], projector(features[1, 3]), atol=1e-6)


def test_the_kinds_of_projector_are_what_their_names_say() -> None:
    torch.manual_seed(0)
    features = torch.randn(5, WIDTH) * 3 + 1
    linear, mlp, deeper, norm = (build_projector(kind, WIDTH, HIDDEN) for kind in ("linear", "mlp", "mlp3x", "norm_mlp"))
    assert torch.allclose(linear(features), F.linear(features, linear[0].weight, linear[0].bias))

    def two_layers(x: torch.Tensor, first: torch.nn.Module, second: torch.nn.Module, gelu: str) -> torch.Tensor:
        middle = F.gelu(F.linear(x, first.weight, first.bias), approximate=gelu)  # type: ignore[arg-type]
        return F.linear(middle, second.weight, second.bias)  # type: ignore[arg-type]

    assert torch.allclose(mlp(features), two_layers(features, mlp[0], mlp[2], "tanh"), atol=1e-6)
    once_more = F.linear(F.gelu(two_layers(features, deeper[0], deeper[2], "none")), deeper[4].weight, deeper[4].bias)
    assert torch.allclose(deeper(features), once_more, atol=1e-6)
    assert torch.allclose(norm(features), two_layers(F.layer_norm(features, (WIDTH,)), norm[1], norm[3], "none"), atol=1e-6)


def test_an_unknown_kind_of_projector_is_refused() -> None:
    with pytest.raises((ValueError, KeyError, PipelineError)):
        build_projector("resampler", WIDTH, HIDDEN)
