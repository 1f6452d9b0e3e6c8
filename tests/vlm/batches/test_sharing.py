"""Rows about one picture in one sequence: the same loss and gradients as on their own, and nothing seen that is not theirs."""

from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import PATCHES, World, row
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features.sources import StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.plan import plan_epoch, split_by_tokens
from pipeline.vlm.batches.schedule import Schedule
from pipeline.vlm.batches.sharing import LONGEST, Sharing, branch_layout, find_sharing, no_sharing
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.model.attention import branch_mask, mask_for
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.loop import train

SCHEDULE = Schedule(
    epochs=1, batch_size=8, micro_tokens=10_000, lr=1e-2, warmup=0.1, min_lr=0.1, weight_decay=0.0, clip_norm=1.0, seed=0
)  # fmt: skip


@pytest.fixture(scope="module")
def asked(world: World) -> TokenTable:
    """Five questions about one picture, three about another, one about two pictures, one without, two with text before it."""
    words = ["cat", "dog here", "what is it now", "is it red or blue", "a"]
    rows = [row(f"<image>\n{text}?", "Yes. A circle.", "1.png") for text in words]
    rows += [row(f"<image>\n{text}?", "No.", "2.png") for text in words[:3]]
    rows += [row("<image><image> same?", "Yes.", "1.png", "2.png"), row("Is there a square?", "Yes.")]
    rows += [row(f"Look: <image> {text}", "It is red.", "1.png") for text in words[:2]]
    return world.tokens(rows, "asked")


def losses(world: World, table: TokenTable, sharing: Sharing, attention: str) -> tuple[float, dict[str, torch.Tensor], int]:
    model = world.model("all")
    model.language_model.set_attn_implementation(attention)
    source, total, tokens = StoredFeatures(world.store, table), torch.zeros(()), 0
    for units in split_by_tokens(np.arange(len(table)), sharing, 10_000):
        batch = collate(table, units, image_id=world.builder.image_id, tokens=PATCHES, sharing=sharing)
        loss, _ = model(batch, source.features(source.load(batch.slots)))
        total, tokens = total + loss, tokens + batch.tokens
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, tokens


def test_rows_with_the_same_beginning_are_found(asked: TokenTable) -> None:
    sharing = find_sharing(asked)
    assert [len(unit) for unit in sharing.units(np.arange(len(asked)))] == [5, 3, 1, 1, 2]
    assert sharing.prefix[8] > sharing.prefix[0] > 0
    assert sharing.prefix[9] == 0, "a row without a picture shares nothing"


def test_what_is_found_is_what_a_comparison_of_all_pairs_finds(world: World) -> None:
    """Pictures in other orders, at other places, after other words, none; a row's neighbours in the file do not matter."""
    texts = ["<image> a?", "<image>a?", "b <image> a?", "<image><image> a?", "<image> a <image> b?", "<image> a?"]
    rows = [
        row(text, "Yes.", *(f"{(picture + i) % 3}.png" for i in range(text.count("<image>"))))
        for picture in (0, 1, 0, 2, 1)
        for text in texts
    ]
    table = world.tokens([*rows, row("Is it?", "No."), row("Is it?", "No."), *rows[::-1]], "pairs")
    sharing, hashes = find_sharing(table), table.image_hashes()
    keys: list[object] = []
    for number in range(len(table)):
        found = table.row(number)
        end = int(found.image_start[-1]) + PATCHES if len(found.image_start) else 0
        assert sharing.prefix[number] == end
        keys.append((found.ids[:end].tobytes(), hashes[found.slots.start : found.slots.stop].tobytes()) if end else number)
    expected = [keys.index(key) for key in keys]
    first = np.unique(sharing.group, return_index=True)[1]
    assert first[sharing.group].tolist() == expected
    assert sharing.group.tolist() == [sorted(set(expected)).index(number) for number in expected], "in order of appearance"
    assert 0.5 < sharing.saved < 1
    assert no_sharing(table.lengths).saved == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_shared_rows_have_the_loss_and_gradients_of_rows_on_their_own(world: World, asked: TokenTable, attention: str) -> None:
    one, gradients, many = losses(world, asked, no_sharing(asked.lengths), attention)
    shared, shared_gradients, few = losses(world, asked, find_sharing(asked), attention)
    assert few < many
    assert shared == pytest.approx(one, rel=1e-6)
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        error = float((gradient - shared_gradients[name]).norm() / gradient.norm().clamp(min=1e-9))
        assert error < 2e-5, name


def test_a_branch_never_sees_another(world: World, asked: TokenTable) -> None:
    """Other words in one branch leave the hidden states of all others as they were."""
    sharing, model, source = find_sharing(asked), world.model("all"), StoredFeatures(world.store, asked)
    batch = collate(asked, [np.arange(5)], image_id=world.builder.image_id, tokens=PATCHES, sharing=sharing)
    assert batch.branch is not None
    mine = batch.branch[0] == 2
    ids = batch.ids.clone()
    ids[0, mine] = (ids[0, mine] + 1) % 50
    states = [hidden(model, replace(batch, ids=found), source) for found in (batch.ids, ids)]
    assert torch.equal(states[0][~mine], states[1][~mine])
    assert not torch.allclose(states[0][mine], states[1][mine])


def hidden(model: VisionLanguageModel, batch, source: StoredFeatures) -> torch.Tensor:  # type: ignore[no-untyped-def]
    embedded = model.embed(batch.ids, source.features(source.load(batch.slots)), batch.slot_row, batch.slot_start)
    with torch.no_grad():
        found = model.language_model.get_decoder()(
            inputs_embeds=embedded,
            attention_mask=mask_for(branch_mask(batch.branch), model.language_model),
            position_ids=batch.position,
            use_cache=False,
        )
    return found.last_hidden_state[0]


def test_the_mask_is_causal_within_prefix_and_branch() -> None:
    branch, position = branch_layout([4, 5], 2)
    assert branch.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert position.tolist() == [0, 1, 2, 3, 2, 3, 4]
    seen = branch_mask(torch.from_numpy(np.append(branch, -1))[None])[0, 0].int().tolist()
    assert seen[3] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert seen[5] == [1, 1, 0, 0, 1, 1, 0, 0]
    assert sum(seen[7]) > 0, "a row of padding that sees nothing would be not-a-number"


many = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 300)), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(rows=many, budget=st.integers(1, 3000), ranks=st.integers(1, 3), batch_size=st.integers(1, 40))
def test_every_row_is_trained_once_whatever_is_shared(rows: list, budget: int, ranks: int, batch_size: int) -> None:
    group = np.unique([g for g, _ in rows], return_inverse=True)[1]
    prefix = np.where(group % 3 == 0, 0, 7 + group).astype(np.int32)
    lengths = np.array([length for _, length in rows], np.int32) + prefix + 1
    sharing = Sharing(group, prefix, lengths)
    steps = plan_epoch(lengths, batch_size=batch_size, seed=1, epoch=0, sharing=sharing)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(rows)))
    assert len(steps) == -(-len(rows) // batch_size)
    found = []
    for rank in range(ranks):
        for part in split_by_tokens(steps[0], sharing, budget, rank=rank, ranks=ranks):
            sizes = [sharing.unit_length(unit) for unit in part]
            assert len(part) == 1 or max(sizes) * len(part) <= budget
            for unit in part:
                assert len(set(group[unit].tolist())) == 1
                assert len(unit) == 1 or (prefix[unit[0]] and sharing.unit_length(unit) <= LONGEST)
            found += [int(number) for unit in part for number in unit]
    assert sorted(found) == sorted(steps[0].tolist())


def test_training_and_held_out_loss_agree_with_and_without_sharing(world: World, asked: TokenTable) -> None:
    """One step of all rows: the same update, so the same weights to rounding."""
    found = []
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    for sharing in (None, find_sharing(asked)):
        model, source = world.model("projector"), StoredFeatures(world.store, asked)
        schedule = replace(SCHEDULE, batch_size=len(asked))
        examples = Examples(asked, source, world.builder.image_id, sharing)
        history = train(model, examples, schedule, accelerator)
        found.append((history[0]["loss"], heldout_loss(model, examples, accelerator, micro_tokens=500)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_row_whose_answer_follows_its_picture_at_once_shares_nothing() -> None:
    """The position that predicts the answer's first word is the last of the prefix: it would belong to all."""
    ids, starts = np.arange(12, dtype=np.int32), np.array([1, 1], np.int32)
    table = MagicMock(lengths=np.array([6, 6], np.int32))
    table.spec = {"tokens": 2}
    spans = (np.array([0, 2, 4]), np.array([3, 6, 4, 6], np.int32))  # the first is supervised from its picture's end on
    table.parts.return_value = iter([((np.array([0, 6, 12]), ids), spans, (np.array([0, 1, 2]), starts))])
    table.image_hashes.return_value = np.zeros((2, 32), np.uint8)
    assert find_sharing(table).prefix.tolist() == [0, 3]
