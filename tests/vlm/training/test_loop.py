"""Training: accumulation changes nothing, what is frozen keeps every byte, runs repeat bit for bit, and it stops before damage."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import PATCHES, ROWS, World, row
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.core.errors import PipelineError
from pipeline.features.sources import NoFeatures, StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.loader import plan_micro_batches
from pipeline.vlm.batches.plan import plan_epoch
from pipeline.vlm.batches.schedule import Execution, Schedule
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.model.freezing import cast_frozen
from pipeline.vlm.model.sharding import gather_weights
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.loop import make_optimizer, train

SCHEDULE = Schedule(
    epochs=2, batch_size=4, micro_tokens=10_000, lr=1e-2, warmup=0.1, min_lr=0.1, weight_decay=0.01, clip_norm=1.0, seed=0
)  # fmt: skip


def run(
    world: World,
    model: VisionLanguageModel,
    schedule: Schedule = SCHEDULE,
    *,
    table: TokenTable | None = None,
    source: Any = None,
) -> list[dict[str, float]]:
    table = table or world.table
    examples = Examples(table, source or StoredFeatures(world.store, table), world.builder.image_id)
    return train(model, examples, schedule, Accelerator(mixed_precision="no", cpu=True))


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.fixture(scope="module")
def eight(world: World) -> TokenTable:
    """Eight rows of unequal lengths and unequal counts of supervised tokens."""
    return world.tokens(ROWS[:8], "eight")


@pytest.mark.parametrize("budget", [1, 64, 120, 250])
@pytest.mark.parametrize("what", ["projector", "all"])
def test_a_step_in_one_piece_equals_the_same_step_in_micro_batches(world: World, eight: TokenTable, budget: int, what: str) -> None:
    """Gradients, loss and history of one step of eight rows, however many passes it takes."""
    schedule = replace(SCHEDULE, epochs=1, batch_size=8)
    parts = len(list(plan_micro_batches(eight, replace(schedule, micro_tokens=budget), 0)))
    assert parts > 1
    found = []
    for micro_tokens in (10_000, budget):
        model, gradients = world.model(what), {}
        hooks = _keep_gradients(model, gradients)
        history = run(world, model, replace(schedule, micro_tokens=micro_tokens), table=eight)
        hooks.remove()
        found.append((history, gradients))
    (whole, whole_gradients), (cut, cut_gradients) = found
    assert len(whole) == len(cut) == 1
    for key in ("loss", "grad_norm"):
        assert cut[0][key] == pytest.approx(whole[0][key], rel=1e-6)
    assert whole_gradients.keys() == cut_gradients.keys()
    for name, gradient in whole_gradients.items():
        error = float((gradient - cut_gradients[name]).norm() / gradient.norm().clamp(min=1e-12))
        assert error < 1e-5, name


def _keep_gradients(model: VisionLanguageModel, found: dict[str, torch.Tensor]) -> Any:
    """Copy every gradient right before an update."""

    def copy(*_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    return register_optimizer_step_pre_hook(copy)


def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(world: World, eight: TokenTable) -> None:
    """Rows weigh by their answers' tokens, not by their number, and not by their micro-batch."""
    model, source = world.model("projector"), StoredFeatures(world.store, eight)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    before = heldout_loss(model, Examples(eight, source, world.builder.image_id), accelerator, micro_tokens=70)
    still = replace(SCHEDULE, epochs=2, batch_size=3, micro_tokens=64, lr=1e-12)
    history = run(world, model, still, table=eight)
    for epoch in range(2):
        counts = [int(eight.supervised[step].sum()) for step in plan_epoch(eight.lengths, batch_size=3, seed=0, epoch=epoch)]
        losses = [row["loss"] for row in history if row["epoch"] == epoch]
        assert np.average(losses, weights=counts) == pytest.approx(before, rel=1e-5)
    shares = [work.weight for work in plan_micro_batches(eight, replace(SCHEDULE, batch_size=8, micro_tokens=64), 0)]
    assert set(shares) == {1 / int(eight.supervised.sum())}


def test_a_step_starts_from_no_gradient(world: World, eight: TokenTable) -> None:
    history = run(world, world.model("all"), replace(SCHEDULE, epochs=3, batch_size=8, lr=1e-12), table=eight)
    assert [row["grad_norm"] for row in history] == pytest.approx([history[0]["grad_norm"]] * 3, rel=1e-4)


ENDS = ("projector.", "language_model.model.layers.0.", "language_model.model.layers.2.")


@pytest.mark.parametrize(("what", "prefixes"), [("projector", ("projector.",)), ("projector+ends", ENDS), ("all", ("",))])
def test_what_trains_changes_and_the_rest_keeps_every_byte_and_gets_no_gradient(
    world: World, what: str, prefixes: tuple[str, ...]
) -> None:
    model, seen = world.model(what), {}
    before = bits(model)
    hooks = _keep_gradients(model, seen)
    run(world, model)
    hooks.remove()
    expected = {name for name in before if name.startswith(prefixes)}
    assert changed(before, bits(model)) == expected
    assert set(seen) == {name for name, _ in model.named_parameters() if name in expected}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("what", ["projector", "all"])
def test_two_runs_give_the_same_bits_and_another_seed_others(world: World, what: str) -> None:
    found = []
    for seed in (0, 0, 1):
        model = world.model(what)
        history = run(world, model, replace(SCHEDULE, seed=seed, micro_tokens=130))
        found.append((history, bits(model)))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


def test_training_learns(world: World) -> None:
    history = run(world, world.model("all"), replace(SCHEDULE, epochs=12, lr=5e-3))
    first, last = (np.mean([row["loss"] for row in part]) for part in (history[:3], history[-3:]))
    assert last < 0.5 * first


def test_the_history_has_a_row_a_step_with_warm_up_and_cosine(world: World) -> None:
    history = run(world, world.model(), replace(SCHEDULE, epochs=8, warmup=0.25, min_lr=0.1))
    steps = 8 * 3
    assert [row["step"] for row in history] == list(range(steps))
    assert [row["epoch"] for row in history] == [step // 3 for step in range(steps)]
    rates = [row["lr"] for row in history]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(SCHEDULE.lr)
    assert top in (steps // 4 - 1, steps // 4)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0.1 * SCHEDULE.lr <= rates[-1] < 0.13 * SCHEDULE.lr
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in history)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_the_very_first_step_trains(world: World, eight: TokenTable, warmup: float) -> None:
    """A run of one step must not end where it began."""
    model = world.model("projector")
    before = bits(model)
    run(world, model, replace(SCHEDULE, epochs=1, batch_size=8, warmup=warmup), table=eight)
    assert changed(before, bits(model))


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_than_a_batch_train(world: World, count: int) -> None:
    table = world.tokens(ROWS[:count], f"few-{count}")
    assert len(run(world, world.model(), table=table)) == SCHEDULE.epochs


@pytest.mark.parametrize("what", ["projector", "all"])
def test_rows_without_images_train_among_others_and_alone(world: World, what: str) -> None:
    """With the language model frozen they teach nothing, yet they must not stop the run."""
    table = world.tokens([row("Is there?", "Yes."), row("What is this?", "None."), row("<image>", "Blue.", "0.png")], "texts")
    for batch_size in (1, 3):
        assert all(
            np.isfinite(row["loss"]) for row in run(world, world.model(what), replace(SCHEDULE, batch_size=batch_size), table=table)
        )


def test_clipping_bounds_the_update_and_reports_the_norm_before_it(world: World, eight: TokenTable) -> None:
    schedule, found = replace(SCHEDULE, epochs=1, batch_size=8, clip_norm=1e-3), {}
    model = world.model("all")
    hooks = _keep_gradients(model, found)
    history = run(world, model, schedule, table=eight)
    hooks.remove()
    assert history[0]["grad_norm"] > 1e-2
    assert float(torch.cat([g.flatten() for g in found.values()]).norm()) == pytest.approx(1e-3, rel=1e-2)


class Poisoned(NoFeatures):
    """Features that turn into something else after some calls."""

    def __init__(self, world: World, value: float, after: int) -> None:
        super().__init__(StoredFeatures(world.store, world.table))
        self._inner, self._value, self._left = StoredFeatures(world.store, world.table), value, after

    def load(self, slots: np.ndarray) -> torch.Tensor:
        features = self._inner.load(slots).clone()
        self._left -= 1
        if self._left < 0 and len(features):
            features[-1, -1, -1] = self._value
        return features


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["projector", "all"])
def test_bad_features_stop_before_the_first_update_and_name_the_batch(world: World, value: float, what: str) -> None:
    model = world.model(what)
    before = bits(model)
    with pytest.raises(PipelineError, match=r"batch with .*rows\.jsonl:\d+: loss .* step 0 .*lower lr") as caught:
        run(world, model, source=Poisoned(world, value, 0))
    assert bits(model) == before
    assert len(caught.value.line().splitlines()) == 1


def test_bad_features_in_one_micro_batch_stop_the_whole_step(world: World) -> None:
    model = world.model("all")
    with pytest.raises(PipelineError, match=r"step [1-9]"):
        run(world, model, replace(SCHEDULE, micro_tokens=60), source=Poisoned(world, float("nan"), 6))
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_a_learning_rate_that_explodes_stops_with_finite_weights_and_names_it(world: World) -> None:
    model = world.model("all")
    with pytest.raises(PipelineError, match=r"lr 1e\+30.*lower lr"):
        run(world, model, replace(SCHEDULE, lr=1e30, epochs=20, warmup=0.0))
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.fixture
def bfloat16() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("failing", [False, True])
def test_a_trained_model_computes_in_float32_where_no_one_asks_otherwise(
    world: World, bfloat16: Accelerator, failing: bool
) -> None:
    """accelerate wraps a forward pass in autocast: training must not leave it so, whether it ends or fails."""
    model, seen = world.model("projector"), []
    model.projector[0].register_forward_hook(lambda _module, _given, found: seen.append(found.dtype))
    source = Poisoned(world, float("nan"), 1) if failing else StoredFeatures(world.store, world.table)
    with pytest.raises(PipelineError) if failing else nullcontext():
        train(model, Examples(world.table, source, world.builder.image_id), SCHEDULE, bfloat16)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    batch = collate(world.table, np.arange(3), image_id=world.builder.image_id, tokens=PATCHES)
    model(batch, StoredFeatures(world.store, world.table).load(batch.slots))
    assert seen == [torch.float32]


@pytest.mark.parametrize("what", ["projector", "projector+ends"])
def test_what_is_frozen_costs_half_and_comes_back_whole(world: World, bfloat16: Accelerator, what: str) -> None:
    """Frozen weights in bfloat16, no state for them; those that train stay float32; what is saved has all in float32."""
    model, fresh = world.model(what), world.model(what)
    cast_frozen(model, torch.bfloat16)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert model.language_model.get_output_embeddings().weight is model.language_model.get_input_embeddings().weight
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    before, histories = bits(fresh), []
    for trained in (model, world.model(what)):
        examples = Examples(world.table, StoredFeatures(world.store, world.table), world.builder.image_id)
        histories.append(train(trained, examples, SCHEDULE, bfloat16))
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == kinds
    halved, full = ([row["loss"] for row in history] for history in histories)
    assert halved == pytest.approx(full, rel=0.02)
    after = bits(gather_weights(model, fresh))
    assert changed(before, after) == {name for name, p in fresh.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["projector", "all"])
def test_compiled_layers_train_the_same_and_are_gone_afterwards(world: World, what: str) -> None:
    accelerator, source = Accelerator(mixed_precision="no", cpu=True), StoredFeatures(world.store, world.table)
    plain, model = run(world, world.model(what)), world.model(what)
    torch._dynamo.utils.counters.clear()
    examples = Examples(world.table, source, world.builder.image_id)
    history = train(model, examples, SCHEDULE, accelerator, execution=Execution(compiled=True))
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "one program for all layers, and for all lengths"
    for here, there in zip(plain, history, strict=True):
        assert there == pytest.approx(here, rel=1e-4)
    assert not any("forward" in layer.__dict__ for layer in model.language_model.get_decoder().layers)


@pytest.mark.parametrize(("what", "counted"), [("projector", False), ("all", True)])
def test_a_mixtures_router_loss_moves_the_router_only_where_it_trains(
    world: World, moe_folder: Path, what: str, counted: bool
) -> None:
    """The same step with and without the router's own loss: gradients differ exactly where the language model trains."""
    table, found = world.tokens(ROWS[:2], f"moe-{what}"), []
    for coefficient in (0.0, 0.5):
        model, gradients = world.model(what, llm=moe_folder), {}
        model.language_model.config.router_aux_loss_coef = coefficient
        hooks = _keep_gradients(model, gradients)
        run(world, model, replace(SCHEDULE, epochs=1, clip_norm=1e9), table=table)
        hooks.remove()
        found.append(gradients)
    differing = {name for name in found[0] if not torch.allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-7)}
    assert any(".mlp.gate." in name for name in differing) == counted
    assert bool(differing) == counted


def test_biases_and_norms_are_not_decayed(world: World) -> None:
    model = world.model("all", kind="norm_mlp")
    decayed, spared = make_optimizer(model, lr=1e-3, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_a_model_in_which_nothing_trains_is_refused(world: World) -> None:
    with pytest.raises(PipelineError, match="no parameter trains"):
        make_optimizer(world.model().requires_grad_(False), lr=1e-3, weight_decay=0.0)
