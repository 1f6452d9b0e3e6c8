"""Our RMSNorm for CPUs computes what Transformers' does: the same bits forward, the same gradients but for rounding."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import World
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.features.sources import StoredFeatures
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.schedule import Schedule
from pipeline.vlm.model import norms
from pipeline.vlm.model.norms import lean_norms, rms_norm
from pipeline.vlm.training import loop as training
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.loop import train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 48), (2, 512), (1, 1, 8)])
def test_bits_forward_and_gradients_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weights: torch.dtype, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(norms, "PIECE", 5 * shape[-1])  # several pieces, the last of them short
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], eps=1e-5)
    norm.weight.data = torch.randn(shape[-1], generator=generator).to(weights)
    given = (3 * torch.randn(shape, generator=generator)).to(dtype)
    states = [given.clone().requires_grad_() for _ in range(2)]
    found, wanted = rms_norm(norm, states[0]), norm(states[1])
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    outside = torch.randn(shape, generator=generator).to(found.dtype)
    (own_states, own_weight), (of_states, of_weight) = (
        torch.autograd.grad(out, [of, norm.weight], outside) for out, of in zip((found, wanted), states, strict=True)
    )
    close = 1e-6 if dtype == weights == torch.float32 else 2e-2
    for own, other in ((own_states, of_states), (own_weight, of_weight)):
        assert own.dtype == other.dtype
        assert float((own.float() - other.float()).norm()) <= close * float(other.float().norm())


def test_under_autocast_it_gives_what_the_products_after_it_would_round_to() -> None:
    norm, states = LlamaRMSNorm(16), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rms_norm(norm, states), norm(states).bfloat16())


def test_a_model_computes_the_same_with_it_and_it_comes_off_again(world: World) -> None:
    model = world.model("all").language_model
    ids = torch.arange(12).view(2, 6)
    plain = model(ids, use_cache=False).logits
    with lean_norms(model, True):
        assert all("forward" in layer.input_layernorm.__dict__ for layer in model.get_decoder().layers)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    with lean_norms(model, False):
        assert "forward" not in model.get_decoder().norm.__dict__
    model.config.model_type = "another"
    with lean_norms(model, True):
        assert "forward" not in model.get_decoder().norm.__dict__


def test_training_uses_it_and_learns_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(
        epochs=1, batch_size=4, micro_tokens=10_000, lr=1e-2, warmup=0.1, min_lr=0.1, weight_decay=0.0, clip_norm=1.0, seed=0
    )  # fmt: skip
    seen: list[bool] = []
    found = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(training, "lean_norms", lambda *_: nullcontext())
        model = world.model("all")
        norm: Any = model.language_model.get_decoder().norm
        found.append(
            train(
                model, Examples(world.table, StoredFeatures(world.store, world.table), world.builder.image_id), schedule,
                Accelerator(cpu=True), callbacks=Callbacks(on_step=lambda _, norm=norm: seen.append("forward" in norm.__dict__)),
            )
        )  # fmt: skip
        assert "forward" not in norm.__dict__
    steps = len(found[0])
    assert seen == [True] * steps + [False] * steps
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
