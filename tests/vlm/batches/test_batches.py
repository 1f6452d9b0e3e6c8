"""Batches: every row once an epoch, a plan that follows from seed and epoch, budgets kept, and rows that become tensors."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import PATCHES, World
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import PipelineError
from pipeline.text.token_table import TokenTable, write_tokens
from pipeline.vlm.batches.collate import MULTIPLE, collate
from pipeline.vlm.batches.plan import MEGABATCH, plan_epoch, split_by_tokens
from pipeline.vlm.batches.sharing import no_sharing

many_lengths = st.lists(st.integers(1, 300), min_size=1, max_size=400).map(lambda found: np.array(found, np.int32))


@settings(max_examples=60, deadline=None)
@given(lengths=many_lengths, batch_size=st.integers(1, 70), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_row_comes_exactly_once_an_epoch_in_steps_of_the_batch_size(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> None:
    steps = plan_epoch(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert len(steps) == -(-len(lengths) // batch_size), "the scheduler counts on it"
    assert sorted(len(step) for step in steps)[1:] == [batch_size] * (len(steps) - 1), "at most one step is short"


def test_the_plan_follows_from_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 200)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        np.random.rand(3)  # the state of anyone else's generator is no part of it
        return [step.tolist() for step in plan_epoch(lengths, batch_size=16, seed=seed, epoch=epoch)]

    assert plan(0, 0) == plan(0, 0)
    distinct = [plan(0, 0), plan(0, 1), plan(1, 0), plan(1, 1)]
    assert all(a != b for i, a in enumerate(distinct) for b in distinct[:i])


def test_rows_of_like_length_share_a_step_and_steps_come_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 32 * MEGABATCH)
    steps = plan_epoch(lengths, batch_size=32, seed=0, epoch=0)
    padded = sum(int(lengths[step].max()) * len(step) for step in steps)
    assert padded < 1.1 * lengths.sum()
    longest = [int(lengths[step].max()) for step in steps]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@settings(max_examples=100, deadline=None)
@given(lengths=many_lengths, budget=st.integers(1, 2000))
def test_micro_batches_stay_within_the_budget_and_lose_no_row(lengths: np.ndarray, budget: int) -> None:
    rows = np.arange(len(lengths))[::2]
    parts = [np.concatenate(part) for part in split_by_tokens(rows, no_sharing(lengths), budget)]
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    for part in parts:
        assert len(part) == 1 or int(lengths[part].max()) * len(part) <= budget
    assert all(len(part) for part in parts)


def test_a_budget_is_filled() -> None:
    lengths = np.full(10, 7)
    assert [len(part) for part in split_by_tokens(np.arange(10), no_sharing(lengths), 28)] == [4, 4, 2]
    assert [len(part) for part in split_by_tokens(np.arange(10), no_sharing(lengths), 6)] == [1] * 10


def test_rows_become_padded_ids_with_labels_one_step_ahead(world: World) -> None:
    table = world.table
    rows = np.array([8, 0, 4, 3])
    batch = collate(table, rows, image_id=world.builder.image_id, tokens=PATCHES)
    longest = int(table.lengths[rows].max())
    assert batch.ids.shape == batch.loss_mask.shape == (4, -(-longest // MULTIPLE) * MULTIPLE)
    assert batch.tokens == table.lengths[rows].sum()
    labels, slots, places = [], [], []
    for position, number in enumerate(rows.tolist()):
        found = table.row(number)
        assert batch.ids[position].tolist() == found.ids.tolist() + [0] * (batch.ids.shape[1] - len(found.ids))
        supervised = [i for start, end in found.spans.tolist() for i in range(start, end)]
        assert batch.loss_mask[position].nonzero().flatten().tolist() == [i - 1 for i in supervised]
        labels += [int(found.ids[i]) for i in supervised]
        slots += list(found.slots)
        places += [(position, start) for start in found.image_start.tolist()]
    assert batch.labels.tolist() == labels
    assert batch.slots.tolist() == slots
    assert list(zip(batch.slot_row.tolist(), batch.slot_start.tolist(), strict=True)) == places


def test_a_batch_without_images_has_no_slots(world: World) -> None:
    batch = collate(world.table, np.array([4, 9]), image_id=world.builder.image_id, tokens=PATCHES)
    assert len(batch.slots) == len(batch.slot_row) == len(batch.slot_start) == 0


def test_a_batch_moves_whole_to_a_device(world: World) -> None:
    batch = collate(world.table, np.array([0]), image_id=world.builder.image_id, tokens=PATCHES).to(torch.device("meta"))
    assert all(t.device.type == "meta" for t in (batch.ids, batch.loss_mask, batch.labels, batch.slot_row, batch.slot_start))


def altered(world: World, path: Path, column: str, number: int, place: int, value: int) -> TokenTable:
    """The world's table with one entry of one row's list changed."""
    (batch,) = world.table._batches
    at = batch.schema.get_field_index(column)
    lists = batch.column(column).to_pylist()
    lists[number][place] = value
    write_tokens(
        path, [batch.set_column(at, batch.schema.field(at), pa.array(lists, batch.schema.field(at).type))], world.table.spec
    )
    return TokenTable(path)


@pytest.mark.parametrize("number", [0, 2, 8])
@pytest.mark.parametrize("place", [0, 7, PATCHES - 1])
def test_a_run_that_lacks_a_placeholder_names_the_row_and_both_counts(
    tmp_path: Path, world: World, number: int, place: int
) -> None:
    start = int(world.table.row(number).image_start[-1])
    table = altered(world, tmp_path / "bad.arrow", "ids", number, start + place, 7)
    rows = np.array([5, number, 4])
    with pytest.raises(PipelineError, match=rf"rows\.jsonl:{number + 1}: .*needs 16 placeholders, found 15 at token {start}"):
        collate(table, rows, image_id=world.builder.image_id, tokens=PATCHES)
    collate(table, np.array([1, 3]), image_id=world.builder.image_id, tokens=PATCHES)


@pytest.mark.parametrize("shift", [-1, 1, 1000])
def test_a_run_that_starts_elsewhere_names_the_row(tmp_path: Path, world: World, shift: int) -> None:
    start = int(world.table.row(0).image_start[0])
    table = altered(world, tmp_path / "bad.arrow", "image_start", 0, 0, start + shift)
    with pytest.raises(PipelineError, match=r"rows\.jsonl:1: .*needs 16 placeholders"):
        collate(table, np.array([8, 0]), image_id=world.builder.image_id, tokens=PATCHES)


@pytest.mark.parametrize("tokens", [PATCHES - 1, PATCHES + 1])
def test_a_table_made_for_another_number_of_patches_is_refused_with_both_counts(world: World, tokens: int) -> None:
    with pytest.raises(PipelineError, match=r"rows\.(jsonl|arrow)") as caught:
        collate(world.table, np.array([5]), image_id=world.builder.image_id, tokens=tokens)
    assert str(tokens) in caught.value.line()
    assert str(PATCHES) in caught.value.line()
