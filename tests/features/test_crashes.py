"""Extraction killed at every call that changes a file, or out of disk there; and a flipped bit anywhere is noticed."""

import errno
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import World

from benchmarks.damage import flipped, noticed, parts, sample
from benchmarks.kills import FREES, Trials, contents, run
from pipeline.core.errors import PipelineError
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.sources import StoredFeatures
from pipeline.features.store.store import FeatureStore
from pipeline.records.images import ImageRoot

Step = Callable[[Path], None]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, encoders: dict[str, Encoder], png: Callable[[int], bytes]) -> list[Step]:
    """Extract five pictures, then ten: the first run ends with a shard that is not full, which the second replaces."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [f"{number}.png" for number in range(10)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))
    files, hashes = distinct_images([(ImageRoot(folder), names)])

    def step(count: int, folder: Path) -> None:
        store, out = folder / "store", folder / "out"
        extract(files[:count], hashes[:count], encoders["clip"], stores=[store], out=out, shard_rows=4, workers=0)

    step(1, folder / "before")  # what libraries load when they are first used, they load before the forks
    return [partial(step, 5), partial(step, 10)]


@pytest.fixture(scope="module")
def trials(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(steps, tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module")
def copying(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """As `trials`, where store and output lie on two filesystems."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def step(extract: Step, folder: Path) -> None:
        os.link = refuse  # type: ignore[assignment]
        extract(folder)

    return Trials([partial(step, each) for each in steps], tmp_path_factory.mktemp("copying"))


@pytest.fixture(scope="module")
def store(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store whose files have no other name, so that they can be damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    for step in steps:
        assert run(partial(step, folder)).code == 0
    return folder / "out"


def one_of_each(trials: Trials) -> list[tuple[int, bool]]:
    """A point for every kind of call, before it and half-way through; the middle one of its kind."""
    kinds: dict[tuple[str, bool], list[tuple[int, bool]]] = {}
    for call, half in trials.points():
        kinds.setdefault((trials.calls[call], half), []).append((call, half))
    return [points[len(points) // 2] for points in kinds.values()]


def test_an_extraction_is_known_by_its_calls(trials: Trials, copying: Trials) -> None:
    both = {"mkdir", "touch", "close", "posix_fallocate", "pwrite", "fchmod", "fsync", "replace", "unlink", "rmdir", "write_text"}
    assert set(trials.calls) == both | {"link"}
    assert set(copying.calls) == both | {"chmod", "copyfile", "touch"}


def test_killed_at_any_kind_of_call_it_goes_on_to_the_same_bytes(trials: Trials) -> None:
    assert [problem for point in one_of_each(trials) if (problem := trials.kill_at(*point))] == []


@pytest.mark.parametrize("shares", [(0.05,), (0.35,), (0.65,), (0.9,), (0.5, 0.3)])
def test_killed_at_a_random_moment_it_goes_on_to_the_same_bytes(trials: Trials, shares: tuple[float, ...]) -> None:
    rng = random.Random(str(shares))
    assert trials.kill_after(*(share + rng.uniform(-0.05, 0.05) for share in shares)) == ""


def test_a_full_disk_is_one_line_and_no_loss(trials: Trials) -> None:
    calls = [call for call, half in one_of_each(trials) if not half and trials.calls[call] not in FREES]
    assert [problem for call in calls if (problem := trials.fill_disk(call))] == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.7, 0.999])
def test_a_full_disk_below_hdf5_is_one_line_and_no_loss(trials: Trials, store: Path, share: float) -> None:
    size = min(file.stat().st_size for file in store.glob("*.h5"))
    assert trials.limit_files(int(share * size)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trials", "copying"])
def test_killed_at_any_call_it_goes_on_to_the_same_bytes(kind: str, request: pytest.FixtureRequest) -> None:
    trials: Trials = request.getfixturevalue(kind)
    assert [problem for point in trials.points() if (problem := trials.kill_at(*point))] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trials", "copying"])
def test_a_full_disk_at_any_call_is_one_line_and_no_loss(kind: str, request: pytest.FixtureRequest) -> None:
    trials: Trials = request.getfixturevalue(kind)
    calls = [call for call, name in enumerate(trials.calls) if name not in FREES]
    assert [problem for call in calls if (problem := trials.fill_disk(call))] == []


def in_place(folder: Path) -> None:
    (folder / "a").write_text("whole")


def leaving_something(folder: Path) -> None:
    temporary = folder / f".a.{os.getpid()}.tmp"
    temporary.write_text("whole")
    temporary.replace(folder / "a")


def stumbling(folder: Path) -> None:
    try:
        leaving_something(folder)
    except OSError:
        raise TypeError from None


def opening(folder: Path) -> None:
    with (folder / "a").open("w") as file:
        file.write("whole")


def test_trials_find_what_is_not_crash_safe(tmp_path: Path) -> None:
    assert "not whole under a final name: a" in Trials([in_place], tmp_path).kill_at(0, True)
    trials = Trials([leaving_something], tmp_path)
    assert trials.calls == ["write_text", "replace"]
    assert "after resuming these differ: .a." in trials.kill_at(1, False)
    assert "ended with 1" in Trials([stumbling], tmp_path).fill_disk(0), "a defect is no line for users"
    with pytest.raises(RuntimeError, match=r"open of .* is not watched"):
        Trials([opening], tmp_path)


def test_every_byte_of_a_store_is_in_one_part(store: Path) -> None:
    found = parts(store)
    assert {part.name for part in found} >= {"rows", "image_sha256", "row_xxh3", "attributes", "seal", "structure", "index"}
    for file in store.iterdir():
        spans = sorted(span for part in found if part.file == file for span in part.spans)
        assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), file.stat().st_size]


def test_a_flipped_bit_anywhere_is_found_by_verify_and_stops_training(store: Path) -> None:
    found, before = parts(store), contents(store)
    assert not any(noticed(found[-1], by_training) for by_training in (False, True)), "an intact store is no problem"
    missed = []
    for part, bit in sample(found, 2 * len({part.name for part in found}), random.Random(0)):
        with flipped(part, bit):
            missed += [(part, bit, way) for way in (False, True) if not noticed(part, way)]
    assert missed == []
    assert contents(store) == before


@pytest.mark.parametrize("key", ["shards", "file", "rows", "spec"])
def test_a_flipped_bit_in_a_key_of_the_index_is_one_line(store: Path, key: str) -> None:
    index = next(part for part in parts(store) if part.name == "index")
    with flipped(index, 8 * index.file.read_bytes().index(f'"{key}"'.encode()) + 8):
        assert noticed(index, by_training=False)
        assert noticed(index, by_training=True)


def test_a_flipped_bit_in_any_row_stops_training_on_it(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    for file in world.store.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rows = [part for part in parts(folder) if part.name == "rows"]
    for part, bit in sample(rows, 10, random.Random(0)):
        with flipped(part, bit):
            source = StoredFeatures(FeatureStore(folder), world.table)
            with pytest.raises(PipelineError, match=rf"{part.file.name}: row \d+ .* fails its checksum"):
                source.load(np.arange(len(world.table.image_hashes())))
