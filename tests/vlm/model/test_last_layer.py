"""Leaving out what nobody asks of the last layer changes nothing: loss and gradients are those of every position computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATCHES, World
from torch.nn import functional as F

from pipeline.features.sources import StoredFeatures
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.model.compiling import compiled_layers
from pipeline.vlm.model.last_layer import MULTIPLE, last_block_only_at
from pipeline.vlm.model.vlm import VisionLanguageModel


@pytest.mark.parametrize("train", ["projector", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_loss_and_gradients_are_those_of_full_logits(world: World, moe_folder: Path, train: str, family: str) -> None:
    models = [world.model(train, llm=moe_folder if family == "qwen3_moe" else None) for _ in range(2)]
    source = StoredFeatures(world.store, world.table)
    batch = collate(world.table, np.arange(len(world.table)), image_id=world.builder.image_id, tokens=PATCHES)
    features = source.features(source.load(batch.slots))
    seen = positions_seen(models[0])
    for model in models:
        model.router_trains = False
    loss = models[0](batch, features)[0]
    embedded = models[1].embed(batch.ids, features, batch.slot_row, batch.slot_start)
    logits = models[1].language_model(inputs_embeds=embedded, use_cache=False).logits  # [B, T, V]
    whole = F.cross_entropy(logits[batch.loss_mask].float(), batch.labels, reduction="sum")
    wanted = -(-len(batch.labels) // MULTIPLE) * MULTIPLE
    assert seen == [wanted], "the block was asked for other positions too"
    assert wanted < batch.ids.numel()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    loss.backward()
    whole.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert float((one.grad - other.grad).norm()) <= 2e-6 * float(other.grad.norm()) + 1e-9, name


def positions_seen(model: VisionLanguageModel) -> list[int]:
    """How many positions the last layer's feed-forward block is asked for, a number a call."""
    seen: list[int] = []
    block = model.language_model.get_decoder().layers[-1].mlp
    block.forward = Counted(block.forward, seen)
    return seen


class Counted:
    def __init__(self, forward, seen: list[int]) -> None:  # type: ignore[no-untyped-def]
        self.forward, self.seen = forward, seen

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        self.seen.append(states.shape[0] * states.shape[1])
        return self.forward(states)


def test_it_ends_with_the_block_and_leaves_others_alone(world: World) -> None:
    model = world.model()
    layer = model.language_model.get_decoder().layers[-1]
    with last_block_only_at(torch.tensor([0]), model.language_model):
        assert "forward" in layer.mlp.__dict__
    with pytest.raises(TypeError), last_block_only_at(torch.tensor([0]), model.language_model):
        layer.mlp(None, None)
    assert "forward" not in layer.mlp.__dict__
    model.language_model.config.model_type = "another"
    with last_block_only_at(torch.tensor([0]), model.language_model):
        assert "forward" not in layer.mlp.__dict__
    model.language_model.config.model_type = "llama"
    with compiled_layers(model, True), last_block_only_at(torch.tensor([0]), model.language_model):
        assert "forward" in layer.mlp.__dict__, "the last layer is not compiled, so that it may do less"
    layer.forward = torch.compile(layer.forward)
    with last_block_only_at(torch.tensor([0]), model.language_model):
        assert "forward" not in layer.mlp.__dict__
