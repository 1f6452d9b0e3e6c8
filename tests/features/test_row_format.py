"""The two forms of a row on disk: what each keeps of a feature, and that int8 is one thing wherever it is read."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import World

from pipeline.core.errors import PipelineError
from pipeline.core.fingerprint import fingerprint
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.store.row_format import Float16Format, Int8Format, calibration_pictures, measure_constants, row_format_of
from pipeline.features.store.shards import Shard, write_shard
from pipeline.features.store.store import FeatureStore

CPU = torch.device("cpu")


def outlying(count: int = 16, tokens: int = 49, width: int = 64) -> torch.Tensor:
    """Features as trained encoders give them: a few channels are a hundred times stronger than the rest."""
    values = torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-0.5, 0.5, width)
    values[..., :3] = values[..., :3] * 20 + 90
    return values


def whitened_error(found: torch.Tensor, true: torch.Tensor) -> float:
    spread = true.flatten(0, 1).std(0)
    return float(((found.float() - true) / spread).norm() / ((true - true.flatten(0, 1).mean(0)) / spread).norm())


def test_int8_keeps_what_naive_int8_and_fp8_lose() -> None:
    true = outlying()
    rows = Int8Format(49, *measure_constants(true))
    error = whitened_error(rows.decode(rows.encode(true)), true)
    scale = true.abs().amax(2, keepdim=True) / 127
    naive = whitened_error((true / scale).round() * scale, true)
    fp8 = whitened_error(true.to(torch.float8_e4m3fn).float(), true)
    assert error < 0.01
    assert error < naive / 10
    assert error < fp8 / 3


def test_an_int8_row_is_half_a_float16_row_and_a_multiple_of_a_disk_block() -> None:
    rows = Int8Format(196, np.zeros(768, np.float32), np.ones(768, np.float32))
    assert rows.shape == (151040,)
    assert rows.shape[0] % 512 == 0
    assert rows.shape[0] < 0.51 * 196 * 768 * 2


@pytest.mark.parametrize("value", [0.0, 1e-7, 6e4])
def test_int8_rows_of_constant_features_are_finite(value: float) -> None:
    rows = Int8Format(4, np.zeros(8, np.float32), np.ones(8, np.float32))
    found = rows.decode(rows.encode(torch.full((2, 4, 8), value)))
    assert torch.isfinite(found).all()
    assert torch.allclose(found.float(), torch.full((2, 4, 8), value), rtol=1e-2, atol=1e-6)


def test_an_int8_row_depends_on_no_other_row() -> None:
    true = outlying()
    rows = Int8Format(49, *measure_constants(true))
    assert torch.equal(rows.encode(true)[3:4], rows.encode(true[3:4]))


def test_the_calibration_pictures_never_change() -> None:
    """Their statistics are part of every int8 store: other pictures would make all of them unreadable."""
    pictures = calibration_pictures(32)
    assert pictures.shape == (16, 3, 32, 32)
    assert np.array_equal(pictures, calibration_pictures(32))
    assert pictures.astype(np.int64).sum() == 6030890


def test_constants_of_another_encoder_are_refused() -> None:
    rows = Int8Format(4, np.zeros(8, np.float32), np.ones(8, np.float32))
    spec = {"tokens": 4, "width": 8, "storage": "int8", "constants": "0" * 32}
    with pytest.raises(ValueError, match="constants"):
        row_format_of(spec, rows.constants)
    assert isinstance(row_format_of({"tokens": 4, "width": 8}, {}), Float16Format)


@pytest.fixture
def int8(vision_folders: dict[str, Path]) -> Encoder:
    return Encoder(str(vision_folders["clip"]), precision="float32", storage="int8", device=CPU, batch=4)


def test_an_int8_store_gives_what_the_live_encoder_gives(int8: Encoder, world: World, tmp_path: Path) -> None:
    files, hashes = distinct_images([(world.images, [f"{i}.png" for i in range(6)])])
    extract(files, hashes, int8, stores=[tmp_path / "store"], out=tmp_path / "out", shard_rows=3, workers=0)
    store = FeatureStore(tmp_path / "out")
    live = int8.encode_files([world.images.read(file.name) for file in files], [file.name for file in files])
    assert torch.equal(store.read(store.locate(hashes)), live)
    exact = world.clip.encode_files([world.images.read(file.name) for file in files], [file.name for file in files])
    assert 0 < whitened_error(live, exact.float()) < 0.02
    store.check_encoder(int8.spec())
    with pytest.raises(PipelineError, match="constants"):
        store.check_encoder(world.clip.spec())


def test_float16_and_int8_are_two_stores(int8: Encoder, world: World) -> None:
    assert fingerprint(int8.spec()) != fingerprint(world.clip.spec())


def test_damage_of_an_int8_shards_constants_is_found(int8: Encoder, world: World, tmp_path: Path) -> None:
    files, hashes = distinct_images([(world.images, [f"{i}.png" for i in range(6)])])
    extract(files, hashes, int8, stores=[tmp_path / "store"], out=tmp_path / "out", shard_rows=100, workers=0)
    path = next((tmp_path / "out").glob("*.h5"))
    with h5py.File(path) as file:
        offset = file["channel_mean"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    broken = tmp_path / "broken.h5"
    broken.write_bytes(data)
    with pytest.raises(PipelineError, match="changed since"):
        Shard(broken)


def test_the_constants_do_not_follow_the_last_bits_of_a_processor() -> None:
    true = outlying()
    mean, spread = measure_constants(true)
    again = measure_constants(true * (1 + 1e-7))
    assert np.array_equal(mean, again[0])
    assert np.array_equal(spread, again[1])


def test_how_far_rows_are_from_float32_is_measured_and_stands_in_the_shard(vision_folders: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for precision, storage in [("float32", "float16"), ("float32", "int8"), ("bfloat16", "float16")]:
        encoder = Encoder(str(vision_folders["clip"]), precision=precision, storage=storage, device=CPU, batch=4)
        found[precision, storage] = encoder.relative_error()
        assert encoder.relative_error() == found[precision, storage], "also when its weights are rounded by now"
    assert 0 < found["float32", "float16"] < 5e-4
    assert found["float32", "float16"] < found["float32", "int8"] < 0.05
    assert 1e-3 < found["bfloat16", "float16"] < 0.05
    rows = Float16Format(4, 6)
    spec = {"tokens": 4, "width": 6}
    write_shard(
        tmp_path / "a.h5", np.ones((1, 32), np.uint8), spec, rows, [np.ones((1, 4, 6), "<f2")], notes={"relative_error": 0.003}
    )
    assert Shard(tmp_path / "a.h5").relative_error == 0.003
