"""A part of the held-out rows that stands for all: over the whole file, over its pictures, the same each time."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from conftest import World

from pipeline.text.spread import spread_rows
from pipeline.text.token_table import TokenTable

Images = list[list[bytes]]


def picture(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def chunked(rows: Images) -> pa.ChunkedArray:
    """In pieces, each a view into a longer one, as a file's are."""
    whole = pa.array([[picture(0)], *rows, []], pa.list_(pa.binary(32)))
    return pa.chunked_array([whole.slice(1, len(rows) // 3), whole.slice(1 + len(rows) // 3, len(rows) - len(rows) // 3)])


def test_every_picture_is_asked_about_before_one_is_twice() -> None:
    rows: Images = [[picture(number // 10), picture(7)] for number in range(3000)]  # ten questions about each of 300
    for limit in (1, 150, 300, 450, 900):
        found = spread_rows(chunked(rows), limit)
        assert len(set(found.tolist())) == limit
        assert found.tolist() == sorted(found.tolist())
        asked = Counter(rows[number][0] for number in found.tolist())
        assert len(asked) == min(limit, 300)
        assert max(asked.values()) - min(asked.values()) <= 1
    half = spread_rows(chunked(rows), 150)
    assert 40 < int((half < 1000).sum()) < 60, "from everywhere in the file"
    assert len({int(number) % 10 for number in half}) == 10, "not always the first question"


def test_rows_without_pictures_have_their_share() -> None:
    rows: Images = [[] if number % 2 else [picture(number // 100)] for number in range(1000)]
    found = spread_rows(chunked(rows), 100)
    shown = [number for number in found.tolist() if rows[number]]
    assert len({rows[number][0] for number in shown}) == len(shown)
    assert 80 < sum(not rows[number] for number in found.tolist()) < 100


def test_a_larger_part_holds_the_smaller_one_and_both_are_always_the_same() -> None:
    rows: Images = [[picture(number % 40)] for number in range(200)]
    small, large = (set(spread_rows(chunked(rows), limit).tolist()) for limit in (20, 70))
    assert small < large
    assert set(spread_rows(chunked(rows), 20).tolist()) == small


@pytest.mark.parametrize("limit", [1, 5, 10])
def test_a_table_of_some_rows_has_them_as_they_are(world: World, limit: int) -> None:
    whole, part = TokenTable(world.table.path), TokenTable(world.table.path, limit=limit)
    places = [whole.where(number) for number in range(len(whole))]
    assert len(part) == limit
    assert part.digest == whole.digest
    hashes, names = whole.image_hashes(), whole.image_names().to_pylist()
    for number in range(limit):
        mine, theirs = part.row(number), whole.row(places.index(part.where(number)))
        for one, other in zip(
            (mine.ids, mine.spans, mine.image_start), (theirs.ids, theirs.spans, theirs.image_start), strict=True
        ):
            assert np.array_equal(one, other)
        for one, other in zip(mine.slots, theirs.slots, strict=True):
            assert np.array_equal(part.image_hashes()[one], hashes[other])
            assert part.image_names()[one].as_py() == names[other]


def test_a_limit_above_the_rows_there_are_is_all_of_them(world: World) -> None:
    assert len(TokenTable(world.table.path, limit=10_000)) == len(TokenTable(world.table.path))
