"""`python -m pipeline.features`: a sound store passes, and no single flipped bit anywhere in it goes unnoticed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.core.checksums import seal
from pipeline.core.errors import PipelineError
from pipeline.core.files import write_json
from pipeline.features.__main__ import app, main_directions
from pipeline.features.store.row_format import Float16Format
from pipeline.features.store.shards import Shard, write_shard

SPEC = {"tokens": 4, "width": 6, "layer": -1}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (10, 32), np.uint8)
    folder = tmp_path / "features"
    folder.mkdir()
    write_shard(folder / "a.h5", hashes, SPEC, Float16Format(4, 6), [rng.normal(size=(10, 4, 6)).astype(np.float16)])
    write_json(folder / "index.json", seal({"shards": [{"file": "a.h5", "rows": 10}], "spec": SPEC}))
    return folder


def test_a_sound_store_passes_and_is_described(store: Path) -> None:
    verified = CliRunner().invoke(app, ["verify", str(store)])
    assert verified.exit_code == 0
    assert "10 rows in 1 shards" in verified.output
    described = CliRunner().invoke(app, ["info", str(store)])
    assert described.exit_code == 0
    assert "[4, 6] float16" in described.output


def test_every_flipped_bit_is_noticed(store: Path) -> None:
    """Of each byte outside the rows and of a sample inside; HDF5 never sees a damaged header."""
    path = store / "a.h5"
    sound = path.read_bytes()
    path.chmod(0o644)
    rng = np.random.default_rng(1)
    unnoticed = []
    for position in rng.choice(len(sound), 1000, replace=False):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            if not list(Shard(path).bad_rows()):
                unnoticed.append(int(position))
        except PipelineError:
            continue
    assert unnoticed == []


def test_a_damaged_row_is_listed_by_image_and_the_others_are_not(store: Path) -> None:
    shard = Shard(store / "a.h5")
    damaged = bytearray((store / "a.h5").read_bytes())
    row = shard.stored[3].tobytes()
    at = damaged.find(row)
    damaged[at + 5] ^= 64
    (store / "a.h5").unlink()
    (store / "a.h5").write_bytes(damaged)
    result = CliRunner().invoke(app, ["verify", str(store)])
    assert result.exit_code == 4
    assert shard.hashes[3].tobytes().hex() in result.output
    assert result.output.count("fails its checksum") == 1


@pytest.mark.parametrize("command", ["verify", "info"])
def test_a_folder_without_a_store_is_one_line(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 4
    assert "dvc repro extract" in result.output


def test_a_missing_shard_is_named(store: Path) -> None:
    (store / "a.h5").unlink()
    result = CliRunner().invoke(app, ["verify", str(store)])
    assert result.exit_code == 4
    assert "a.h5" in result.output


def test_patches_that_differ_are_drawn_in_different_colours() -> None:
    features = torch.zeros(2, 16, 5, dtype=torch.float16)
    features[:, 8:, 2] = 4
    drawn = main_directions(features + 0.01 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).half())
    assert drawn.shape == (2, 4, 4, 3)
    assert abs(int(drawn[0, 0, 0, 0]) - int(drawn[0, 3, 3, 0])) > 128


def test_a_contact_sheet_of_the_users_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    root = Path(__file__).parents[2]
    for name in ("params.yaml", "data"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    from pipeline.features.distinct import distinct_images
    from pipeline.records.images import ImageRoot

    _, hashes = distinct_images([(ImageRoot("data/easyvqa/images.zip"), [f"train/{i}.png" for i in range(8)])])
    shutil.rmtree(store)
    store.mkdir()
    rows = np.random.default_rng(0).normal(size=(len(hashes), 4, 6)).astype(np.float16)
    write_shard(store / "a.h5", hashes, SPEC, Float16Format(4, 6), [rows])
    write_json(store / "index.json", seal({"shards": [{"file": "a.h5", "rows": len(hashes)}], "spec": SPEC}))
    result = CliRunner().invoke(app, ["show", str(store), "--count", "4", "--out", "sheet.png"])
    assert result.exit_code == 0, result.output
    assert Image.open("sheet.png").size[0] > 500
