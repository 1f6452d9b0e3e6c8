"""Token tables: rows come back whole, long rows are never cut in an image or left without an answer, workers change nothing."""

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import PATCHES, World, len_of, read_records, row
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import checksums
from pipeline.core.errors import PipelineError
from pipeline.records.formats import SourceSpec, open_source
from pipeline.records.formats.conversation import Reading, turns_and_pictures
from pipeline.records.images import digest
from pipeline.records.record import Record
from pipeline.text import tokenization
from pipeline.text.builder import Prompt
from pipeline.text.token_table import SCHEMA, TokenTable, write_tokens
from pipeline.text.tokenization import RowTokenizer, Summary, tokenize


def tokenizer_of(world: World, *, max_tokens: int = 256, too_long: str = "cut") -> RowTokenizer:
    return RowTokenizer(world.builder, world.images, max_tokens, too_long)


def records_of(rows: list[dict[str, object]]) -> list[Record]:
    places = [f"rows.jsonl:{line}" for line in range(1, len(rows) + 1)]
    made = [turns_and_pictures(content, Reading(), where=place) for content, place in zip(rows, places, strict=True)]
    return [Record(place, tuple(images), turns) for place, (turns, images) in zip(places, made, strict=True)]


def test_every_row_comes_back_as_it_was_built(world: World, png: Callable[[int], bytes]) -> None:
    records = list(read_records(world.folder / "rows.jsonl"))
    prompts = world.builder.build_batch([record.turns for record in records])
    table, names, hashes = world.table, world.table.image_names(), world.table.image_hashes()
    assert len(table) == len(records)
    assert table.spec == world.builder.spec()
    next_slot = 0
    for number, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        found = table.row(number)
        assert found.ids.tolist() == prompt.ids.tolist()
        assert [tuple(span) for span in found.spans.tolist()] == list(prompt.spans)
        assert found.image_start.tolist() == list(prompt.image_starts)
        assert found.slots == range(next_slot, next_slot + len(record.images))
        assert [names[slot].as_py() for slot in found.slots] == list(record.images)
        assert [hashes[slot].tobytes() for slot in found.slots] == [digest(png(int(name[0]))) for name in record.images]
        assert table.lengths[number] == len(prompt.ids)
        assert table.supervised[number] == sum(end - start for start, end in prompt.spans)
        assert table.where(number) == record.where == f"{world.folder}/rows.jsonl:{number + 1}"
        next_slot += len(record.images)
    assert table.slots == next_slot == len(hashes)


def save(path: Path, world: World, parts: list[list[Record]]) -> TokenTable:
    make = tokenizer_of(world)
    write_tokens(path, (make(part)[0] for part in parts), world.builder.spec())
    return TokenTable(path)


@pytest.mark.parametrize("limit", [1, 3, 5, 8, 10, 11, 12, 99])
def test_a_table_of_some_rows_is_the_same_however_it_was_cut_into_batches(tmp_path: Path, world: World, limit: int) -> None:
    records = list(read_records(world.folder / "rows.jsonl"))
    save(tmp_path / "parts.arrow", world, [records[:2], records[2:5], [], records[5:]])
    table, whole = (TokenTable(path, limit=limit) for path in (tmp_path / "parts.arrow", world.table.path))
    count = min(limit, len(world.table))
    assert (len(table), table.slots) == (len(whole), whole.slots) == (count, len(table.image_hashes()))
    assert table.lengths.tolist() == whole.lengths.tolist()
    assert table.supervised.tolist() == whole.supervised.tolist()
    assert np.array_equal(table.image_hashes(), whole.image_hashes())
    assert table.image_names().to_pylist() == whole.image_names().to_pylist()
    for number in range(count):
        assert table.where(number) == whole.where(number)
        for ours, theirs in zip(
            (table.row(number).ids, table.row(number).spans), (whole.row(number).ids, whole.row(number).spans), strict=True
        ):
            assert np.array_equal(ours, theirs)


def test_an_empty_table_has_no_rows(tmp_path: Path, world: World) -> None:
    table = save(tmp_path / "none.arrow", world, [])
    assert (len(table), table.slots, table.image_hashes().shape) == (0, 0, (0, 32))


def damaged(path: Path, kind: str, world: World) -> None:
    data = (world.folder / "rows.arrow").read_bytes()
    if kind == "no supervised token":
        batch = tokenizer_of(world)(records_of([row("Is this?", "Yes.")]))[0]
        spans = pa.array([[3, 3]], pa.list_(pa.int32()))
        write_tokens(path, [batch.set_column(1, SCHEMA.field(1), spans)], world.builder.spec())
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"not an Arrow file", "truncated": data[: len(data) // 2]}[kind])
        checksums.record(path)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "no supervised token"])
def test_a_damaged_table_is_one_line_that_names_it(tmp_path: Path, world: World, kind: str) -> None:
    damaged(tmp_path / "bad.arrow", kind, world)
    with pytest.raises(PipelineError, match=r"bad\.arrow") as caught:
        TokenTable(tmp_path / "bad.arrow")
    assert len(caught.value.line().splitlines()) == 1


# A conversation whose parts have known places, so that every cut point can be tried.
LONG = {
    "messages": [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "A red square, there is none."},
        {"role": "user", "content": "<image><image> And this?"},
        {"role": "assistant", "content": "It is a yellow triangle."},
    ],
    "images": ["0.png", "1.png", "2.png"],
}


def whole_prompt(world: World) -> Prompt:
    return world.builder.build(records_of([LONG])[0].turns)


def require_sound(prompt: Prompt, arrow: dict[str, Any], limit: int, image_id: int) -> None:
    """What every stored row must be, whatever was cut."""
    ids, spans, starts = arrow["ids"], np.array(arrow["spans"]).reshape(-1, 2), arrow["image_start"]
    assert len(ids) <= limit
    assert ids == prompt.ids[: len(ids)].tolist(), "only the end is cut"
    assert len(spans) > 0
    assert all(0 < start < end <= len(ids) for start, end in spans.tolist())
    assert len(starts) == len(arrow["image_sha256"]) == len(arrow["image_name"])
    places = [position for start in starts for position in range(start, start + PATCHES)]
    assert [position for position, token in enumerate(ids) if token == image_id] == places, "no image is cut or lost"


def test_a_cut_never_parts_an_image_nor_takes_the_last_answer(world: World) -> None:
    prompt = whole_prompt(world)
    first = tokenizer_of(world)
    outcomes = set()
    for limit in range(1, len(prompt.ids) + 2):
        first._max = limit
        batch, found = first(records_of([LONG]))
        assert found.rows_in == 1 == found.rows + found.refused
        if found.rows:
            (arrow,) = batch.to_pylist()
            require_sound(prompt, arrow, limit, world.builder.image_id)
            assert found.cut == (limit < len(prompt.ids))
            assert (found.tokens, found.longest) == (len(arrow["ids"]), len(arrow["ids"]))
            outcomes.add("cut" if found.cut else "whole")
        else:
            assert "rows.jsonl:1" in found.too_long[0]["where"]
            assert f"{len(prompt.ids)} tokens, tokenize.max_tokens is {limit}" in found.too_long[0]["reason"]
            outcomes.add("refused")
    assert outcomes == {"refused", "cut", "whole"}


@settings(max_examples=25, deadline=None)
@given(
    limit=st.integers(1, 130),
    policy=st.sampled_from(["cut", "skip"]),
    kinds=st.lists(st.sampled_from(["long", "image", "text", "two"]), min_size=1, max_size=6),
)
def test_every_row_is_kept_or_refused_and_every_kept_row_is_sound(world: World, limit: int, policy: str, kinds: list[str]) -> None:
    rows = {"long": LONG, "image": row("<image>\nWhat?", "A circle.", "0.png"), "text": row("Is there?", "Yes."),
            "two": row("<image>or<image>", "None.", "1.png", "1.png")}  # fmt: skip
    records = records_of([rows[kind] for kind in kinds])
    prompts = {record.where: world.builder.build(record.turns) for record in records}
    total, refused = Summary(), list[dict[str, str]]()
    tokenizer = tokenizer_of(world, max_tokens=limit, too_long=policy)
    batches = list(tokenize(iter(records), tokenizer, total, workers=1, progress=len_of, refuse=refused.append))
    kept = [arrow for batch in batches for arrow in batch.to_pylist()]
    assert total.rows_in == len(kinds) == len(kept) + total.refused
    assert [arrow["where"] for arrow in kept] == [where for where in prompts if where not in {row["where"] for row in refused}]
    assert total.too_long == refused[:10]
    for arrow in kept:
        require_sound(prompts[arrow["where"]], arrow, limit, world.builder.image_id)
        if policy == "skip":
            assert len(arrow["ids"]) == len(prompts[arrow["where"]].ids)
    assert total.tokens == sum(len(arrow["ids"]) for arrow in kept)
    assert total.images == sum(len(arrow["image_name"]) for arrow in kept)


def test_stop_names_the_rows_their_lengths_and_the_knob(world: World) -> None:
    records = records_of([row("Is there?", "Yes."), LONG, row("Is there?", "No."), LONG])
    with pytest.raises(PipelineError, match=r"rows\.jsonl:2 .*rows\.jsonl:4 .*tokenize\.max_tokens") as caught:
        list(tokenize(iter(records), tokenizer_of(world, max_tokens=40, too_long="stop"), Summary(), workers=1, progress=len_of))
    assert f"{len(whole_prompt(world).ids)} tokens" in caught.value.line()


def test_progress_counts_every_row_that_went_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "CHUNK", 2)
    seen: list[int] = []
    records = records_of([LONG] * 5)
    list(tokenize(iter(records), tokenizer_of(world, max_tokens=20, too_long="skip"), Summary(), workers=1, progress=seen.append))
    assert seen == [2, 2, 1]


def test_a_missing_image_names_the_row_and_the_image(world: World) -> None:
    records = records_of([row("Is there?", "Yes."), row("<image>", "A dog.", "dog.png")])
    with pytest.raises(PipelineError, match=r"^rows\.jsonl:2: .*dog\.png"):
        list(tokenize(iter(records), tokenizer_of(world), Summary(), workers=1, progress=len_of))


def test_several_workers_write_the_bytes_of_one(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "CHUNK", 3)  # many chunks in flight, of unequal length
    rows = [json.loads(line) for line in (world.folder / "rows.jsonl").read_text().splitlines()]
    records = records_of([rows[number % len(rows)] for number in range(40)])
    totals = {}
    for workers in (1, 4):
        totals[workers] = Summary()
        batches = tokenize(
            iter(records), tokenizer_of(world, max_tokens=60, too_long="skip"), totals[workers], workers=workers, progress=len_of
        )
        write_tokens(tmp_path / f"{workers}.arrow", batches, world.builder.spec())
    assert (tmp_path / "1.arrow").read_bytes() == (tmp_path / "4.arrow").read_bytes()
    assert totals[1] == totals[4]
    assert totals[1].refused


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, world: World) -> None:
    """Read, tokenised, a third of them refused, and written: what is held is a few chunks, however many rows there are."""
    kinds = [json.dumps(LONG), json.dumps(row("<image>\nWhat?", "A circle.", "0.png")), json.dumps(row("Is there?", "Yes."))]
    tokenizer = tokenizer_of(world, max_tokens=60, too_long="skip")

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f"{kinds[number % 3]}\n" for number in range(count)))
        source, total = open_source(SourceSpec(str(path), images=str(world.images.path))), Summary()
        gc.collect()
        tracemalloc.start()
        batches = tokenize(source.records(), tokenizer, total, workers=2, progress=len_of, refuse=str)
        write_tokens(tmp_path / f"{count}.arrow", batches, world.builder.spec())
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (total.rows_in, total.refused) == (count, count // 3)
        return held

    peak(300)  # what is made once
    few, many = peak(3_000), peak(12_000)
    assert many < few + 9_000 * 40, f"{(many - few) / 9_000:.0f} bytes a row"


def test_a_table_is_read_through_a_map(tmp_path: Path, world: World) -> None:
    """Opening it takes some tens of bytes a row, not the rows."""
    batch = tokenizer_of(world)(records_of([LONG] * 250))[0]
    write_tokens(tmp_path / "many.arrow", [batch] * 40, world.builder.spec())
    tracemalloc.start()
    table = TokenTable(tmp_path / "many.arrow")
    held = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes()
    tracemalloc.stop()
    assert len(table) == 10_000
    assert held < 100 * len(table) < (tmp_path / "many.arrow").stat().st_size / 5
