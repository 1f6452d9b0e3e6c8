"""Number formats on the device: float32 is float32, bfloat16 is no further from it than on a CPU, float16 skips what overflows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import GradScalerKwargs
from conftest import CPU, World
from gpu_device import DEVICE, NEEDS_GPU, ON_GPU, accelerator_on, fresh_kernels, needs_gpu, run_on  # noqa: F401
from test_answering import Setting, learnt  # noqa: F401
from test_checkpoint import logits, manifest_of
from test_gpu_features import pictures, towers  # noqa: F401
from test_loop import SCHEDULE, bits
from test_packing import Found, losses

from pipeline.core.devices import use_fast_float32
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.tower import load_tower
from pipeline.features.sources import StoredFeatures
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.plan import pack_by_tokens, split_by_tokens
from pipeline.vlm.batches.schedule import Execution
from pipeline.vlm.batches.sharing import no_sharing
from pipeline.vlm.evaluation.answering import Answering, answer_questions
from pipeline.vlm.evaluation.questions import find_questions
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.packed_attention import PACKED
from pipeline.vlm.training.callbacks import Callbacks

# float32 sums of a few hundred terms; products in TF32 or bfloat16 are wrong by 3e-4 and more
TRUE_FLOAT32 = 2e-5


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the norm of what is exact."""
    return float((found.detach().cpu().double() - exact.detach().cpu().double()).norm() / exact.detach().double().norm())


def exact_states(encoder: Encoder, folder: Path, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tower's patch states, and what its patch embedding alone gives, computed in float64 on the CPU."""
    tower = load_tower(str(folder), "").double().eval()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (encoder.preprocess.mean, encoder.preprocess.std))
    values = (pixels.double() * encoder.preprocess.rescale - mean) / std
    with torch.inference_mode():
        states = tower(values).last_hidden_state
        patches = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d))(values)
    return states[:, states.shape[1] - encoder.tokens :], patches


@pytest.mark.parametrize("family", ["clip", "siglip", pytest.param("clip-b16", marks=NEEDS_GPU)])
def test_an_encoder_in_float32_computes_in_float32(towers: dict[str, Path], family: str) -> None:
    """Against float64: the patch embedding, which is a convolution, and the whole tower."""
    use_fast_float32()
    encoder = Encoder(str(towers[family]), precision="float32", device=DEVICE, batch=4)
    pixels, seen = pictures(encoder, 4), []
    convolution = next(module for module in encoder.tower.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda _module, _given, found: seen.append(found))
    states = encoder._forward(encoder.tower, pixels, "float32")
    exact, patches = exact_states(encoder, towers[family], pixels)
    assert states.dtype == torch.float32
    assert distance(seen[0], patches) < TRUE_FLOAT32
    assert distance(states, exact) < TRUE_FLOAT32


def test_a_model_in_float32_computes_in_float32(world: World) -> None:
    """Loss and gradients of all weights against float64."""
    use_fast_float32()
    batch = collate(world.table, np.arange(len(world.table)), image_id=world.builder.image_id, tokens=world.store.tokens)
    features = world.store.read(world.store.locate(world.table.image_hashes()[batch.slots]))
    exact, found = world.model("all").double(), world.model("all").to(DEVICE)
    wanted, _ = exact(batch, features)
    loss, _ = found(batch.to(DEVICE), features.to(DEVICE))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=TRUE_FLOAT32)
    wanted.backward()
    loss.backward()
    for (name, parameter), other in zip(found.named_parameters(), exact.parameters(), strict=True):
        assert distance(parameter.grad, other.grad) < TRUE_FLOAT32, name


def all_losses(world: World, device: torch.device, *, attention: str = "sdpa", bfloat16: bool) -> Found:
    """Loss and gradients of all rows of the world, padded or packed."""
    rows, each = np.arange(len(world.table)), no_sharing(world.table.lengths)
    pack = 10_000 if attention == PACKED else 0
    parts = (pack_by_tokens if pack else split_by_tokens)(rows, each, 10_000)
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        return losses(world, world.table, each, parts, attention=attention, pack=pack, device=device)


@needs_gpu
@pytest.mark.parametrize("attention", ["sdpa", PACKED])
def test_in_bfloat16_a_gpu_is_no_further_from_float32_than_a_cpu(world: World, attention: str) -> None:
    """The sum of all gradients' distances, and the loss."""
    exact, gradients = all_losses(world, CPU, bfloat16=False)
    found = [all_losses(world, CPU, bfloat16=True), all_losses(world, DEVICE, attention=attention, bfloat16=True)]
    cpu, gpu = (sum(float((part[name] - gradients[name]).norm()) for name in gradients) for _, part in found)
    assert gpu < 1.5 * cpu
    assert found[1][0] == pytest.approx(exact, rel=0.02)


@needs_gpu
@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_features_in_half_precision_are_no_further_from_float64_than_on_a_cpu(
    towers: dict[str, Path], family: str, precision: str
) -> None:
    """A row as it is stored; float16 has three bits more than bfloat16, so the same bound holds for it."""
    found = []
    for device, name in ((CPU, "bfloat16"), (DEVICE, precision)):
        encoder = Encoder(str(towers[family]), precision=name, device=device, batch=4)
        pixels = pictures(encoder, 4)
        exact, _ = exact_states(encoder, towers[family], pixels)
        found.append(distance(encoder.encode(pixels, list("0123")).cpu(), exact))
    assert found[1] < 1.5 * found[0]


OVERFLOWING = GradScalerKwargs(init_scale=2.0**30)


@needs_gpu
@pytest.mark.parametrize("what", ["projector", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_float16_skips_steps_that_overflow_and_goes_on(world: World, what: str, packed: bool) -> None:
    """A scale that is far too large: the first step changes no byte, later ones train, and no loss is ever lost."""
    model, seen = world.model(what), []
    before = bits(model)
    callbacks = Callbacks(on_step=lambda _: seen.append({name: p.detach().cpu() for name, p in model.state_dict().items()}))
    schedule = replace(SCHEDULE, epochs=16, lr=5e-3)
    options = {"precision": "float16", "execution": Execution(packed=packed), "kwargs_handlers": [OVERFLOWING]}
    history = run_on(world, model, schedule, callbacks=callbacks, **options)
    weights = [{name: tensor.numpy().tobytes() for name, tensor in step.items()} for step in seen]
    skipped = [not np.isfinite(row["grad_norm"]) for row in history]
    assert skipped[0]
    assert not any(skipped[-20:]), "the scale has come down"
    for number, (was, now) in enumerate(zip([before, *weights], weights, strict=False)):
        assert (was == now) == skipped[number], f"step {number}"
    losses = [row["loss"] for row in history]
    assert all(np.isfinite(losses))
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())


@needs_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_in_half_precision_follows_the_one_in_float32(world: World, precision: str) -> None:
    """Losses step by step within 3 %, weights in float32 all the way."""
    exact = run_on(world, world.model("all"))
    model = world.model("all")
    found = run_on(world, model, precision=precision, execution=Execution(packed=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in exact], rel=0.03)


def test_a_checkpoint_of_a_cpu_loads_and_answers_alike_on_the_device(world: World, learnt: Setting, tmp_path: Path) -> None:
    """The same answers word for word, and the same logits to rounding."""
    model, table, source = learnt
    checkpoint.save(tmp_path / "m", model, manifest_of(world, own_llm=True), world.builder)
    asking, found = Answering(max_new_tokens=8, batch_size=4, tokens=999), []
    there = checkpoint.load(tmp_path / "m")[0].eval().to(DEVICE)
    for which, device, features in ((model, CPU, source), (there, DEVICE, StoredFeatures(world.store, table, DEVICE))):
        with accelerator_on(device) as accelerator:
            examples = Examples(table, features, world.builder.image_id)
            found.append(answer_questions(which, examples, accelerator, world.builder, asking, find_questions(table)))
    assert found[0] == found[1]
    assert len(set(found[0])) > 2, "answers that are all alike would compare nothing"
    assert torch.allclose(logits(world, there.cpu()), logits(world, model))
    batch = collate(world.table, np.arange(4), image_id=world.builder.image_id, tokens=world.store.tokens)
    features = world.store.read(world.store.locate(world.table.image_hashes()[batch.slots]))
    loss, _ = there.to(DEVICE)(batch.to(DEVICE), features.to(DEVICE))
    assert float(loss.detach()) == pytest.approx(float(model(batch, features)[0].detach()), rel=TRUE_FLOAT32)
