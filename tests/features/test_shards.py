"""A shard: what is written is read, by any HDF5 tool; damage is named."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.fingerprint import fingerprint
from pipeline.features.store.row_format import Float16Format
from pipeline.features.store.shards import Shard, shard_name, write_shard
from pipeline.features.store.store import ShardSet
from pipeline.records.images import digest

ROW = (3, 5)  # P, Dv of the shards that are written without an encoder

ROWS = Float16Format(*ROW)

SPEC = {"tokens": 3, "width": 5, "weights": "abc"}

FEATURES = np.random.default_rng(0).normal(size=(10, *ROW)).astype(np.float16)

HASHES = np.frombuffer(b"".join(digest(bytes([i])) for i in range(10)), np.uint8).reshape(-1, 32)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "one.h5"
    write_shard(path, HASHES, SPEC, ROWS, [FEATURES[:4], FEATURES[4:]])
    return path


def rows(shard: Shard, numbers: list[int]) -> np.ndarray:
    out = np.empty((len(numbers), *ROW), np.float16)
    ShardSet([shard], ROWS).read_into(np.array(numbers), out)
    return out


def test_a_shard_gives_back_its_rows_hashes_and_spec(shard: Path) -> None:
    found = Shard(shard)
    numbers = [9, 0, 4, 4, 3]
    assert np.array_equal(rows(found, numbers), FEATURES[numbers])
    assert np.array_equal(found.hashes, HASHES)
    assert (found.spec, found.fingerprint, len(found)) == (SPEC, fingerprint(SPEC), 10)


def test_plain_h5py_reads_a_shard(shard: Path) -> None:
    with h5py.File(shard, "r") as file:
        assert np.array_equal(file["features"][:], FEATURES)
        assert np.array_equal(file["image_sha256"][:], HASHES)
        assert file["features"].dtype == np.float16
        assert file["features"].chunks is None, "a row is one read at a known offset"
        assert [h5py.h5g.get_objinfo(file[name].id).mtime for name in file] == [0, 0, 0], "no times: equal bytes on every day"
        assert set(file.attrs) >= {"format", "fingerprint", "spec"}


def test_equal_content_gives_equal_bytes_however_it_is_batched(shard: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.h5"
    write_shard(again, HASHES, SPEC, ROWS, [FEATURES[i : i + 3] for i in range(0, 10, 3)])
    assert again.read_bytes() == shard.read_bytes()


def test_the_name_follows_from_encoder_and_images_in_order() -> None:
    names = {shard_name("a", HASHES), shard_name("b", HASHES), shard_name("a", HASHES[::-1]), shard_name("a", HASHES[:9])}
    assert len(names) == 4
    assert shard_name("a", HASHES.copy()) in names


@pytest.mark.parametrize("batches", [[FEATURES[:9]], [FEATURES.astype(np.float32)], [FEATURES[:, :2]]])
def test_a_shard_that_cannot_be_finished_never_appears(tmp_path: Path, batches: list[np.ndarray]) -> None:
    with pytest.raises(ValueError):
        write_shard(tmp_path / "one.h5", HASHES, SPEC, ROWS, batches)
    assert list(tmp_path.iterdir()) == []


def overwrite(path: Path, data: bytes) -> None:
    path.unlink()  # a finished shard is read-only
    path.write_bytes(data)


@pytest.mark.parametrize("row", [0, 5, 9])
def test_one_flipped_bit_is_an_error_that_names_file_and_row(shard: Path, row: int) -> None:
    data = bytearray(shard.read_bytes())
    data[data.index(FEATURES[row].tobytes()) + 7] ^= 0x10
    overwrite(shard, bytes(data))
    found = Shard(shard)
    others = [number for number in range(10) if number != row]
    assert np.array_equal(rows(found, others), FEATURES[others])
    for _ in range(2):
        with pytest.raises(PipelineError, match=rf"one\.h5: row {row} .*{HASHES[row].tobytes().hex()[:16]}"):
            rows(found, [0, row])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_an_error_that_names_it(shard: Path, share: float) -> None:
    data = shard.read_bytes()
    overwrite(shard, data[: int(len(data) * share)])
    with pytest.raises(PipelineError, match=r"one\.h5"):
        rows(Shard(shard), list(range(10)))
