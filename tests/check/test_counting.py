"""What the check counts with: constant memory, sets of keys, spreads of numbers."""

import base64
import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
from checked import ROOT
from conftest import row
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.check.counting import HIGHEST, Keys, Spread
from pipeline.check.survey import Settings, Subject, survey
from pipeline.params.reading import load
from pipeline.records.formats import Source, SourceSpec


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Every row has a picture of its own, within the row, so names and contents are as many as rows."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "BMP")
    settings = Settings(None, load(ROOT / "params.yaml").tokenize, whole=False, examples=4)
    peaks = {}
    for rows in (1000, 1000, 4000):  # the first warms up
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as out:
            for number in range(rows):
                picture = base64.b64encode(file.getvalue() + number.to_bytes(4, "big")).decode()
                out.write(json.dumps(row(f"<image>{number}", "y" * 200, f"data:image/bmp;base64,{picture}")) + "\n")
        source = Source(SourceSpec(str(path)))
        tracemalloc.start()
        report = survey(Subject("x", str(path), "", source), settings, lambda _: None)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (report.good, report.pictures.distinct, len(report.pictures.contents)) == (rows, rows, rows)
    assert peaks[4000] - peaks[1000] < 3000 * 100, peaks  # bytes: two digests of 8, doubled while they are sorted


@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=30), max_size=20))
def test_keys_are_a_set(batches: list[list[int]]) -> None:
    keys, plain = Keys(), set[int]()
    for batch in batches:
        array = np.array(batch, np.uint64)
        assert keys.has(array).tolist() == [key in plain for key in batch]
        assert keys.add(array) == len(set(batch) - plain)
        plain |= set(batch)
        assert len(keys) == len(plain)
    assert keys.sorted().tolist() == sorted(plain)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=80), st.integers(1, 99), st.integers(0, 3000))
def test_a_spread_knows_quantiles_and_every_number_is_in_one_bin(values: list[int], percent: int, limit: int) -> None:
    spread = Spread()
    spread.add(values[: len(values) // 2])
    spread.add(values[len(values) // 2 :])
    ordered = sorted(values)
    found = spread.quantile(percent / 100)
    assert sum(value <= found for value in values) >= percent / 100 * len(values) - 1e-9
    assert sum(value < found for value in values) <= percent / 100 * len(values)
    assert (spread.smallest, spread.largest, spread.sum) == (ordered[0], ordered[-1], sum(values))
    assert spread.above(limit) == sum(value > limit for value in values)
    bins = list(spread.bins())
    assert len(bins) <= 14
    assert sum(count for _, _, count in bins) == len(values)
    for first, last, count in bins:
        assert count == sum(first <= value <= last for value in values)


def test_a_spread_takes_numbers_of_any_size() -> None:
    spread = Spread()
    spread.add([3, HIGHEST + 5, 10**12])
    assert (spread.largest, spread.above(10), spread.quantile(1.0)) == (10**12, 2, 10**12)
    assert sum(count for _, _, count in spread.bins()) == 3
