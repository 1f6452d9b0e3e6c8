"""Language models that are not packed, on the device: mixtures of experts and sliding windows train as they do on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, HIDDEN, ROWS, World
from gpu_device import CLOSE, DEVICE, ON_GPU, fresh_kernels, run_on  # noqa: F401
from test_loop import SCHEDULE, bits
from test_mixtures import FAMILIES
from transformers import AutoModelForCausalLM, MistralConfig

from pipeline.vlm.batches.schedule import Schedule
from pipeline.vlm.model.attention import choose_attention
from pipeline.vlm.model.packed_attention import PACKED

CONFIGS: dict[str, Any] = {
    **FAMILIES,
    "mistral": MistralConfig(
        vocab_size=320, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, max_position_embeddings=512, sliding_window=24, initializer_range=0.2, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    ),
}  # fmt: skip
PIECES = Schedule(
    epochs=4, batch_size=4, micro_tokens=130, lr=5e-3, warmup=0.1, min_lr=0.1, weight_decay=0.0, clip_norm=1.0, seed=0
)
family = pytest.mark.parametrize("family", CONFIGS)
what = pytest.mark.parametrize("what", ["projector", "all"])


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, config in CONFIGS.items():
        found[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(2)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


@family
def test_these_are_not_packed_while_all_of_them_trains(llms: dict[str, Path], world: World, family: str) -> None:
    """A router that trains counts the tokens of rows of its own, and a window is no mask of ours."""
    model = world.model("all", llm=llms[family])
    assert choose_attention(model.language_model, DEVICE, 256, router_trains=model.router_trains) != PACKED


@pytest.mark.slow
@family
@what
def test_they_train_on_the_device_as_on_a_cpu(llms: dict[str, Path], world: World, family: str, what: str) -> None:
    """Losses fall, and those of the first epoch are a CPU's: later ones may part where rounding sends a token to another expert."""
    found = [
        [row["loss"] for row in run_on(world, world.model(what, llm=llms[family]), PIECES, device=device)]
        for device in ([CPU, DEVICE] if ON_GPU else [CPU])
    ]
    assert len(found[0]) == PIECES.epochs * -(-len(ROWS) // PIECES.batch_size)
    assert found[-1][:3] == pytest.approx(found[0][:3], rel=1000 * CLOSE)
    assert np.mean(found[-1][-3:]) < np.mean(found[-1][:3])


@pytest.mark.slow
@family
def test_two_runs_give_the_same_bits(llms: dict[str, Path], world: World, family: str) -> None:
    found = []
    for _ in range(2):
        model = world.model("all", llm=llms[family])
        found.append((run_on(world, model, SCHEDULE), bits(model.cpu())))
    assert found[0] == found[1]
