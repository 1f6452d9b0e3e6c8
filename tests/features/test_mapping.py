"""Rows of many files as one array: every row where it should be, at any row size."""

import gc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.features.store.mapping import HUGE, RowMap, _place

PAGE = 4096


@pytest.mark.parametrize("shape", [(196, 768), (7,), (150_920,), (2**18,)])
def test_rows_of_files_are_one_array(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng, parts, expected = np.random.default_rng(0), [], []
    for number, (offset, rows) in enumerate([(65536, 3), (131072, 1), (65536, 5)]):
        values = rng.integers(0, 256, (rows, *shape), np.uint8)
        path = tmp_path / str(number)
        path.write_bytes(b"\0" * offset + values.tobytes() + b"behind")
        parts.append((path, offset))
        expected.append(values)
    found = RowMap(parts, shape, np.dtype(np.uint8))
    for first, values in zip(found.first, expected, strict=True):
        assert np.array_equal(found.rows[first : first + len(values)], values)
    picked = np.concatenate([first + np.arange(len(values)) for first, values in zip(found.first, expected, strict=True)])[::-1]
    out = np.empty((len(picked), *shape), np.uint8)
    np.take(found.rows, picked, axis=0, out=out, mode="clip")
    assert np.array_equal(out, np.concatenate(expected)[::-1])
    assert not found.rows.flags.writeable


@pytest.mark.parametrize("offsets", [(8192, 8192, 6144), (6144, 8192), (6144, 2048, 100)])
def test_rows_that_no_mapping_brings_together_are_read(tmp_path: Path, offsets: tuple[int, ...]) -> None:
    parts, expected = [], np.arange(3 * len(offsets) * 8192, dtype=np.uint32).reshape(-1, 8192)
    for number, offset in enumerate(offsets):
        path = tmp_path / str(number)
        path.write_bytes(b"\1" * offset + expected[3 * number : 3 * number + 3].tobytes() + b"behind")
        parts.append((path, offset))
    found, out = RowMap(parts, (8192,), np.dtype(np.uint32)), np.empty_like(expected)
    found.take(np.concatenate([first + np.arange(3) for first in found.first]), out)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("size", [301_056, 150_920, 2**19, 12_345, 7])
@pytest.mark.parametrize("step", [HUGE, PAGE])
def test_files_lie_whole_rows_apart_and_do_not_overlap(size: int, step: int) -> None:
    offsets, lengths = [65536 * (1 + number % 3) for number in range(200)], [10**8 + number for number in range(200)]
    places, end = _place(offsets, lengths, size, step)
    assert all(place % PAGE == 0 for place in places)
    assert all((place + offset - places[0] - offsets[0]) % size == 0 for place, offset in zip(places, offsets, strict=True))
    assert all(one + length <= other for (one, other), length in zip(pairwise(places), lengths, strict=False))
    assert end == places[-1] + lengths[-1]


def test_address_space_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\0" * 65536 + b"row")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    found = RowMap([(tmp_path / "file", 65536)], (3,), np.dtype(np.uint8))
    assert str(tmp_path) in maps.read_text()
    assert found.rows[0].tobytes() == b"row"
    del found
    gc.collect()
    assert str(tmp_path) not in maps.read_text()
