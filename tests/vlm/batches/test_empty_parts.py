"""Parts without a picture or without a row, beside full ones: however a table is cut into batches, it is the same table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import PATCHES, ROWS, World, row
from test_sharing import SCHEDULE

from pipeline.features.sources import FeatureSource, LiveFeatures, NoFeatures, StoredFeatures
from pipeline.records.formats.conversation import Reading, turns_and_pictures
from pipeline.records.record import Record
from pipeline.text.token_table import TokenTable, write_tokens
from pipeline.text.tokenization import RowTokenizer
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.loader import plan_micro_batches
from pipeline.vlm.batches.packing import row_budget
from pipeline.vlm.batches.plan import pack_by_tokens, split_by_tokens
from pipeline.vlm.batches.sharing import find_sharing, no_sharing
from pipeline.vlm.evaluation.answering import Answering, answer_questions
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.evaluation.questions import find_questions
from pipeline.vlm.training.loop import train

SHOWN = [ROWS[0], ROWS[2], ROWS[6], ROWS[7], ROWS[8], ROWS[3]]
TEXT = [row("Is there a square?", "Yes."), row("Which colour is it now?", "Blue, none."), row("Is it?", "No.")]
CUTS: dict[str, list[list[dict[str, object]]]] = {
    "no picture first": [TEXT, SHOWN],
    "no picture in the middle": [SHOWN[:3], TEXT, SHOWN[3:]],
    "no picture last": [SHOWN, TEXT],
    "no picture anywhere": [TEXT, TEXT],
    "no picture in one batch of one": [TEXT],
    "single rows in turn": [[one] for pair in zip(TEXT, SHOWN, strict=False) for one in pair],
    "no row first": [[], SHOWN, TEXT],
    "no row in the middle": [SHOWN, [], TEXT],
    "no row last": [TEXT, SHOWN, []],
    "nothing on both sides": [[], [], TEXT, [], SHOWN, [], []],
}


def table_of(world: World, parts: list[list[dict[str, object]]], path: Path) -> TokenTable:
    """A token table whose Arrow batches are `parts`."""
    make = RowTokenizer(world.builder, world.images, 256, "stop")
    batches, number = [], 0
    for part in parts:
        records = []
        for content in part:
            number += 1
            turns, images = turns_and_pictures(content, Reading(), where=f"rows:{number}")
            records.append(Record(f"rows:{number}", tuple(images), turns))
        batches.append(make(records)[0])
    write_tokens(path, batches, world.builder.spec())
    return TokenTable(path)


Pair = tuple[TokenTable, TokenTable]


@pytest.fixture(params=CUTS)
def both(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Pair:
    """The same rows cut as the case says, and in one piece."""
    parts = CUTS[request.param]
    rows = [one for part in parts for one in part]
    return table_of(world, parts, tmp_path / "cut.arrow"), table_of(world, [rows], tmp_path / "whole.arrow")


def test_the_table_reads_the_same(both: Pair) -> None:
    cut, whole = both
    assert (len(cut), cut.slots) == (len(whole), whole.slots)
    for name in ("lengths", "supervised"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name))
    assert np.array_equal(cut.image_hashes(), whole.image_hashes())
    assert cut.image_names().to_pylist() == whole.image_names().to_pylist()
    for number in range(len(whole)):
        one, other = cut.row(number), whole.row(number)
        assert (cut.where(number), one.slots) == (whole.where(number), other.slots)
        for name in ("ids", "spans", "image_start"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("limit", [1, 3, 4, 6])
def test_a_limit_may_leave_parts_out(both: Pair, limit: int) -> None:
    cut, whole = (TokenTable(table.path, limit=limit) for table in both)
    assert (len(cut), cut.slots) == (len(whole), whole.slots)
    assert np.array_equal(cut.image_hashes(), whole.image_hashes())
    assert np.array_equal(find_sharing(cut).group, find_sharing(whole).group)


def test_the_same_rows_share_their_beginning(both: Pair) -> None:
    cut, whole = (find_sharing(table) for table in both)
    for name in ("group", "prefix", "lengths"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name))
    assert cut.saved == whole.saved
    shown = [bool(both[0].row(number).slots) for number in range(len(both[0]))]
    assert all(bool(prefix) <= shows for prefix, shows in zip(cut.prefix, shown, strict=True))
    if sum(shown) >= len(SHOWN):
        assert cut.saved > 0


@pytest.mark.parametrize("packed", [False, True])
def test_steps_and_micro_batches_are_the_same(both: Pair, packed: bool) -> None:
    found = []
    for table in both:
        sharing = find_sharing(table)
        planned = list(plan_micro_batches(table, SCHEDULE, 0, sharing=sharing, packed=packed))
        found.append([([unit.tolist() for unit in micro.units], micro.weight, micro.parts, micro.last) for micro in planned])
        assert sorted(n for micro in planned for unit in micro.units for n in unit) == list(range(len(table)))
        assert row_budget(table.lengths, SCHEDULE.batch_size, 512) >= table.lengths.max()
    assert found[0] == found[1]


def test_more_processes_than_units_leave_some_without_any(both: Pair) -> None:
    table = both[0]
    rows, sharing = np.arange(len(table)), no_sharing(table.lengths)
    for split in (split_by_tokens, pack_by_tokens):
        parts = [split(rows, sharing, 200, rank=rank, ranks=12) for rank in range(12)]
        assert sorted(int(n) for part in parts for units in part for unit in units for n in unit) == rows.tolist()
    for even in (False, True):
        planned = list(plan_micro_batches(table, SCHEDULE, 0, rank=11, ranks=12, even=even))
        assert [micro.weight for micro in planned if micro.last] == [0.0] * -(-len(table) // SCHEDULE.batch_size)


@pytest.mark.parametrize("pack", [0, 512])
def test_batches_are_the_same(world: World, both: Pair, pack: int) -> None:
    image_id = world.builder.image_id
    cut, whole = (Examples(table, StoredFeatures(world.store, table), image_id, find_sharing(table)) for table in both)
    rows = np.arange(len(cut.table))
    groups = [cut.sharing.units(rows), [rows[:1]], [rows[-1:]]]
    text = [number for number in rows.tolist() if not cut.table.row(number).slots]
    groups += [[np.array([number]) for number in text]] * bool(text)
    for units in groups:
        one, other = cut.collate(units, pack=pack), whole.collate(units, pack=pack)
        for name in ("ids", "real", "loss_positions", "labels", "slot_row", "slot_start"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert np.array_equal(one.slots, other.slots)
        assert len(one.labels) == cut.table.supervised[np.concatenate(units)].sum()


def sources(world: World, table: TokenTable) -> list[FeatureSource]:
    stored = StoredFeatures(world.store, table)
    return [stored, LiveFeatures(world.clip, world.images, table, cache_bytes=1 << 20), NoFeatures(stored)]


def test_feature_sources_answer_for_no_picture_as_for_many(world: World, both: Pair) -> None:
    table = both[0]
    slots = [np.array(table.row(number).slots, np.int64) for number in range(len(table))]
    everything = np.arange(table.slots)
    expected = StoredFeatures(world.store, both[1]).load(everything)
    for source in sources(world, table):
        source.announce(np.empty(0, np.int64))
        found = list(source.stream((number, source.load(part)) for number, part in enumerate(slots)))
        assert [number for number, _ in found] == list(range(len(table)))
        assert [tuple(features.shape[:2]) for _, features in found] == [(len(part), PATCHES) for part in slots]
        assert {features.dtype for _, features in found} == {torch.float16}
        if not isinstance(source, NoFeatures) and table.slots:
            assert torch.equal(torch.cat([features for _, features in found]), expected)


@pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_and_measuring_are_the_same(world: World, both: Pair, live: bool) -> None:
    accelerator, found = Accelerator(mixed_precision="no", cpu=True), []
    for table in both:
        source = sources(world, table)[live]
        model, examples = world.model("all"), Examples(table, source, world.builder.image_id, find_sharing(table))
        history = train(model, examples, SCHEDULE, accelerator)
        loss = heldout_loss(model, examples, accelerator, micro_tokens=200)
        questions = find_questions(table)
        answers = answer_questions(model, examples, accelerator, world.builder, Answering(2, 4, 999), questions)
        blind = Examples(table, NoFeatures(source), world.builder.image_id)
        unseen = answer_questions(model, blind, accelerator, world.builder, Answering(2, 4, 999, blind=True), questions)
        turns = sum(len(table.row(number).spans) for number in range(len(table)))
        assert turns == len(answers) == len(unseen)
        found.append(([step["loss"] for step in history], loss, answers, unseen))
    assert np.isfinite(found[0][0]).all()
    assert found[0] == found[1]
