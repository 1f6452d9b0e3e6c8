"""Pictures that are missing or broken under `data.on_error`: which rows they cost is the same in every stage, and listed."""

import io
import random
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from conftest import World, row
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from projects import Project

from pipeline.core.errors import PipelineError
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import Processes, extract
from pipeline.features.store.store import FeatureStore
from pipeline.records import decoder
from pipeline.records.formats import Digests, GoodImages, readable
from pipeline.records.images import ImageError, ImageRoot, digest
from pipeline.records.record import Record

BROKEN = {"torn.jpg": "decoded", "bomb.png": "pixels", "page.jpg": "known format", "empty.png": "empty file"}
BAD = {"missing.png": "no such image", **BROKEN}
Png = Callable[[int], bytes]


def break_pictures(folder: Path) -> None:
    """A JPEG cut in half, ten billion pixels in a kilobyte, a web page named .jpg and nothing at all."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    (folder / "torn.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    chunks = [(b"IHDR", (100_000).to_bytes(4, "big") * 2 + b"\x01\0\0\0\0"), (b"IDAT", zlib.compress(bytes(1000)))]
    bomb = [len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(bomb))
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "empty.png").touch()


@pytest.fixture
def project(world: World, png: Png, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Eight good pictures and every kind of bad one, in all three data sets and at the end, middle and start of shards."""
    monkeypatch.chdir(tmp_path)
    made = Project(world, tmp_path)
    for number in range(12):
        (made.pictures / f"{number}.png").write_bytes(png(number))
    break_pictures(made.pictures)
    good = [row("<image>\nWhat is this?", f"A circle, {number}.", f"{number}.png") for number in range(12)]
    bad = [row("<image>\nWhat is this?", "A square.", name) for name in BAD]
    two = row("<image><image>", "One of them.", "1.png", "page.jpg")
    made.write("pretrain.jsonl", [bad[0], *good[:3], *bad[1:3], good[3], bad[3], two, good[4], bad[4], row("Is it?", "No.")])
    made.write("sft.jsonl", [*good[2:8], bad[1], two, row("<image>", "Blue.", "only-sft.jpg"), bad[0], good[0]])
    (made.pictures / "only-sft.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    made.write("heldout.jsonl", [good[10], bad[2], good[11]])
    made.set("data.on_error=skip", "data.max_bad_share=0.7")
    return made


def test_a_bad_picture_costs_the_same_rows_in_every_stage(project: Project, world: World) -> None:
    figures = project.run("extract")
    assert (figures["images"], figures["encoded"], figures["rejected"]) == (7, 7, 5)
    told = project.listed("features_rejected.csv")
    assert sorted(line["image"].rpartition(" ")[2].strip("'") for line in told) == sorted(BAD)
    for line in told:
        assert BAD[line["image"].rpartition(" ")[2].strip("'")] in line["reason"]
        assert line["image"].startswith("data/mine/pictures: ")
        assert line["remedy"]

    figures = project.run("tokenize")
    expected = {"pretrain": [1, 5, 6, 8, 9, 11], "sft": [7, 8, 9, 10], "heldout": [2]}
    store = FeatureStore("data/features")
    for name, lines in expected.items():
        table, found = project.table(name), figures[name]
        assert [int(line["row"]) for line in project.listed(f"tokens/rejected_{name}.csv")] == lines
        assert found["rows_in"] == found["rows"] + found["rejected"] == len(table) + len(lines)
        assert found["rejected"] == len(lines)
        if name != "sft":
            features = store.read(store.locate(table.image_hashes()))
            files = [(project.pictures / image.as_py()).read_bytes() for image in table.image_names()]
            assert (features == world.clip.encode_files(files, ["?"] * len(files))).all()
    (torn,) = [line for line in project.listed("tokens/rejected_sft.csv") if "only-sft.jpg" in line["reason"]]
    assert torn["reason"].startswith("data/mine/pictures: 'only-sft.jpg': not a picture")
    assert torn["remedy"]

    assert project.run("pretrain")["questions"] == len(project.table("heldout")) == 2
    assert project.run("sft")["questions"] == 2  # reads every picture again, live


def test_stop_says_which_picture_also_where_its_hole_is_stored(project: Project) -> None:
    project.run("extract")
    project.set("data.on_error=stop")
    with pytest.raises(PipelineError, match=r"missing\.png"):
        project.run("extract")
    (project.pictures / "missing.png").write_bytes((project.pictures / "9.png").read_bytes())
    with pytest.raises(PipelineError, match=r"(torn|bomb|page|empty)\.(jpg|png)"):
        project.run("extract")


def test_stop_finds_a_picture_that_only_sft_shows_before_anything_is_trained(project: Project) -> None:
    good = [row("<image>\nWhat is this?", "A circle.", f"{number}.png") for number in range(3)]
    project.set("data.on_error=stop")
    project.write("pretrain.jsonl", good[:2])
    project.write("heldout.jsonl", good[2:])
    project.write("sft.jsonl", [row("<image>", "Blue.", "only-sft.jpg"), *good[:2], row("<image>", "Red.", "missing.png")])
    project.run("extract")
    with pytest.raises(PipelineError, match=r"2 of 4 rows are bad .*only-sft\.jpg.*missing\.png.*on_error") as caught:
        project.run("tokenize")
    assert "sft.jsonl:1" in caught.value.line()
    assert not Path("data/tokens").exists()


def test_more_rows_with_bad_pictures_than_allowed_still_stop(project: Project) -> None:
    project.set("data.max_bad_share=0.45")
    project.run("extract")
    with pytest.raises(PipelineError, match=r"6 of 12 rows are bad \(50\.0%\).*max_bad_share"):
        project.run("tokenize")


def test_a_second_run_encodes_nothing_and_gives_the_same_bytes(project: Project) -> None:
    project.run("extract", "tokenize")
    before = project.outputs()
    assert project.run("extract")["encoded"] == 0
    project.run("tokenize")
    assert project.outputs() == before


@pytest.mark.slow
def test_processes_and_workers_change_no_byte(project: Project) -> None:
    project.run("extract", "tokenize")
    before = project.outputs()
    project.set("runtime.workers=2", "runtime.tokenize_workers=2", "runtime.feature_stores=[elsewhere]")
    assert project.run("extract")["encoded"] == 7
    project.run("tokenize")
    assert project.outputs() == before


def test_a_mended_picture_is_used_and_a_picture_that_breaks_is_not(project: Project) -> None:
    project.run("extract", "tokenize")
    (project.pictures / "torn.jpg").write_bytes((project.pictures / "9.png").read_bytes())
    (project.pictures / "0.png").write_bytes(b"GIF89a")
    assert project.run("extract")["encoded"] == 1
    project.run("tokenize")
    assert {line["row"] for line in project.listed("tokens/rejected_pretrain.csv")} == {"1", "2", "6", "8", "9", "11"}


@pytest.fixture
def broken(png: Png, tmp_path: Path) -> ImageRoot:
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    break_pictures(tmp_path / "images")
    return ImageRoot(tmp_path / "images")


NAMES = ["torn.jpg", "0.png", "1.png", "page.jpg", "bomb.png", "empty.png", "2.png", "3.png", "4.png", "page.jpg", "5.png"]


def test_a_picture_that_can_be_decoded_after_all_gets_its_row(
    broken: ImageRoot, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a newer decoder would read it: the shard in the store is made again, under the same name."""
    files, hashes = distinct_images([(broken, [f"{number}.png" for number in range(4)])])
    options: dict[str, Any] = {"stores": [tmp_path / "s"], "out": tmp_path / "o", "shard_rows": 3, "workers": 0, "skip": True}
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "MAX_PIXELS", 10)
        assert extract(files, hashes, encoders["clip"], **options).images == 0
    assert FeatureStore(tmp_path / "o").find(hashes).tolist() == [-1] * 4
    done = extract(files, hashes, encoders["clip"], **options)
    assert (done.images, done.encoded, done.bad) == (4, 4, [])
    assert FeatureStore(tmp_path / "o").find(hashes).tolist() == [0, 1, 2, 3]


def test_two_processes_leave_out_the_same_pictures_and_no_row_is_without_one(
    broken: ImageRoot, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    files, hashes = distinct_images([(broken, NAMES)])
    barrier = Barrier(2, timeout=60)

    def part(rank: int, ranks: int, name: str) -> tuple[list[bool], list[str]]:
        done = extract(
            files, hashes, encoders["clip"], stores=[tmp_path / f"store {name}"], out=tmp_path / name, shard_rows=2, workers=0,
            skip=True, processes=Processes(rank, ranks, barrier.wait) if ranks > 1 else Processes(),
        )  # fmt: skip
        return done.good.tolist(), [error.line() for error in done.bad]

    alone = part(0, 1, "alone")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: part(rank, 2, "both"), range(2))) == [alone, alone]
    read = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("alone", "both")}
    assert read["alone"] == read["both"]
    store = FeatureStore(tmp_path / "alone")
    assert len(store) == sum(alone[0])
    assert all(shard.hashes.any(1).all() for shard in store.shards)
    assert store.find(hashes[alone[0]]).tolist() == list(range(len(store)))
    assert store.read(np.arange(len(store))).abs().sum((1, 2)).min() > 0
    assert alone[0] == [name not in BROKEN for name in dict.fromkeys(NAMES)]


def test_a_picture_that_vanishes_on_the_way_is_an_error_even_under_skip(
    broken: ImageRoot, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    files, hashes = distinct_images([(broken, ["0.png", "1.png"])])
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(PipelineError, match=r"1\.png") as caught:
        extract(files, hashes, encoders["clip"], stores=[tmp_path / "s"], out=tmp_path / "o", shard_rows=3, workers=0, skip=True)
    assert not isinstance(caught.value, ImageError)
    assert not list((tmp_path / "s").rglob("*.h5"))


@settings(max_examples=40, deadline=None)
@given(chosen=st.lists(st.lists(st.sampled_from([*BAD, "0.png", "1.png", "2.png"]), max_size=3), min_size=1, max_size=12))
def test_rows_in_are_rows_used_and_rows_listed(world: World, tmp_path_factory: pytest.TempPathFactory, chosen: list) -> None:
    folder = tmp_path_factory.mktemp("pictures")
    break_pictures(folder)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(world.images.read(f"{number}.png"))
    table = folder / "good.npy"
    keys = [digest(world.images.read(f"{number}.png")) for number in random.Random(len(chosen)).sample(range(3), 2)]
    GoodImages.write(table, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32))
    records = [Record(f"f:{number}", tuple(names), ()) for number, names in enumerate(chosen)]
    for good in (None, GoodImages(table)):
        rows = list(readable(records, Digests(ImageRoot(folder), good).digest_of_decodable))
        assert [isinstance(row, Record) for row in rows] == [not set(names) & set(BAD) for names in chosen]
        assert [row.where for row in rows] == [record.where for record in records]


def test_the_table_of_good_pictures_knows_each_and_no_other(tmp_path: Path) -> None:
    hashes = np.random.default_rng(0).integers(0, 256, (500, 32), dtype=np.uint8)
    hashes[:100, -1] = 0  # NumPy's texts drop zeros at their end
    hashes[100:200, -3:] = 0
    GoodImages.write(tmp_path / "good.npy", hashes)
    good = GoodImages(tmp_path / "good.npy")
    assert all(key.tobytes() in good for key in hashes)
    for key in hashes:
        other = key.copy()
        other[-1] ^= 1
        assert other.tobytes() not in good
    GoodImages.write(tmp_path / "none.npy", hashes[:0])
    assert hashes[0].tobytes() not in GoodImages(tmp_path / "none.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY torn", None])
def test_a_table_that_is_none_names_the_stage_that_makes_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "good.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"good\.npy.*dvc repro extract"):
        GoodImages(path)
