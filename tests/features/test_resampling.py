"""Pillow's resizing changes with its major version: rows of two never mix, what is stored stays valid, and a line says so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import pytest
from conftest import World
from projects import Project

from pipeline.core.fingerprint import fingerprint
from pipeline.features import resampling
from pipeline.features.distinct import distinct_images
from pipeline.features.extraction import Extraction, extract
from pipeline.features.store.store import FeatureStore


@pytest.fixture(autouse=True)
def _as_locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever Pillow runs the tests."""
    monkeypatch.setattr(PIL, "__version__", "12.3.0")
    resampling._told.clear()
    yield
    resampling._told.clear()


@pytest.fixture
def run(world: World, tmp_path: Path) -> Callable[[str], Extraction]:
    def extract_to(out: str) -> Extraction:
        files, hashes = distinct_images([(world.images, [f"{number}.png" for number in range(4)])])
        return extract(files, hashes, world.clip, stores=[tmp_path / "store"], out=tmp_path / out, shard_rows=2, workers=0)

    return extract_to


@pytest.mark.parametrize(("version", "said"), [("12.3.0", {}), ("12.9.post1", {}), ("13.0.0", {"resampling": "Pillow 13"})])
def test_only_another_major_version_is_named(version: str, said: dict[str, str]) -> None:
    assert resampling.resampling_of(version) == said


def test_rows_of_another_pillow_go_to_a_store_of_their_own_and_those_that_are_there_stay(
    run: Callable[[str], Extraction],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("before").encoded == 4
    old, plain = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.h5")}, world.clip.spec()
    assert "resampling" not in plain
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    assert fingerprint(world.clip.row_spec()) != fingerprint(plain)
    assert run("other").encoded == 4, "none is taken over"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "made with Pillow 12, which resizes some pictures otherwise than Pillow 13 here -> pip install 'pillow==12.*'" in line
    assert FeatureStore(tmp_path / "other").spec["resampling"] == "Pillow 13"
    monkeypatch.setattr(PIL, "__version__", "12.4.0")
    assert run("again").encoded == 0
    assert {path: path.read_bytes() for path in old} == old
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in (tmp_path / "before").iterdir()}


def test_training_and_going_on_with_features_of_another_pillow_is_a_warning(
    world: World, tmp_path: Path, png: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    project = Project(world, tmp_path)
    for number in range(2):
        (project.pictures / f"{number}.png").write_bytes(png(number))
    talk = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A red circle."}]
    for name, number in (("pretrain", 0), ("sft", 0), ("heldout", 1)):
        project.write(f"{name}.jsonl", [{"conversations": talk, "image": f"{number}.png"}])
    project.run("extract", "tokenize")
    capsys.readouterr()
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    project.run("pretrain")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert line.startswith("warning: data/features: made with Pillow 12")
    monkeypatch.setattr(PIL, "__version__", "12.3.0")
    project.run("sft")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert line.startswith("warning: models/pretrain: made with Pillow 13")
