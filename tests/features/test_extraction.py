"""Extraction into a store: each picture once, the output follows from the data alone, whatever happened before."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World
from test_shards import overwrite

from pipeline.core.errors import PipelineError
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.encoding import Encoding
from pipeline.features.extraction import Extraction, extract
from pipeline.features.store.store import INDEX, FeatureStore
from pipeline.records.images import ImageError, ImageRoot, digest


@pytest.fixture
def images(tmp_path: Path, png: Callable[[int], bytes]) -> ImageRoot:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "copy of 1.png").write_bytes(png(1))
    (folder / "bad.png").write_bytes(b"<html>")
    return ImageRoot(folder)


Extract = Callable[..., Extraction]


@pytest.fixture
def run(tmp_path: Path, images: ImageRoot, encoders: dict[str, Encoder]) -> Extract:
    """Extract the images of these numbers, three to a shard, into tmp_path/OUT through tmp_path/STORE."""

    def extract_numbers(
        numbers: str, *, out: str = "out", store: str = "store", encoder: Encoder | None = None, workers: int = 0
    ) -> Extraction:
        files, hashes = distinct_images([(images, [f"{number}.png" for number in numbers])])
        chosen = encoder or encoders["clip"]
        return extract(files, hashes, chosen, stores=[tmp_path / store], out=tmp_path / out, shard_rows=3, workers=workers)

    return extract_numbers


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def by_hash(folder: Path) -> dict[bytes, bytes]:
    """Every row's bytes by image, whatever shard it lies in."""
    store = FeatureStore(folder)
    hashes = np.concatenate([shard.hashes for shard in store.shards])
    return {key.tobytes(): row.numpy().tobytes() for key, row in zip(hashes, store.read(np.arange(len(store))), strict=True)}


def test_duplicates_are_stored_once_in_order_of_first_appearance(images: ImageRoot, png: Callable[[int], bytes]) -> None:
    files, hashes = distinct_images([(images, ["3.png", "1.png", "3.png"]), (images, ["copy of 1.png", "0.png", "3.png"])])
    assert [file.name for file in files] == ["3.png", "1.png", "0.png"]
    assert [key.tobytes() for key in hashes] == [digest(png(number)) for number in (3, 1, 0)]


def test_the_store_answers_by_content_with_the_encoders_rows(
    run: Extract, tmp_path: Path, encoders: dict[str, Encoder], png: Callable[[int], bytes]
) -> None:
    assert run("01234567").encoded == 8
    store = FeatureStore(tmp_path / "out")
    asked = [7, 0, 4, 4, 2, 5]
    found = store.locate(np.frombuffer(b"".join(digest(png(i)) for i in asked), np.uint8).reshape(-1, 32))
    expected = encoders["clip"].encode_files([png(i) for i in asked], [str(i) for i in asked])
    assert torch.equal(store.read(found), expected)
    assert store.read(found[:0]).shape == (0, store.tokens, store.width)
    with pytest.raises(PipelineError, match=r"no features for 1 of 2 images.*" + digest(b"?").hex()[:16]):
        store.locate(np.frombuffer(digest(png(0)) + digest(b"?"), np.uint8).reshape(-1, 32))


def test_a_second_run_encodes_nothing_and_gives_the_same_bytes(run: Extract, tmp_path: Path) -> None:
    assert run("01234567").encoded == 8
    assert run("01234567", out="again").encoded == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_one_more_image_encodes_one_and_leaves_full_shards_as_they_are(run: Extract, tmp_path: Path) -> None:
    run("0123456")
    full = {file.name: file.stat().st_ino for file in (tmp_path / "out").glob("*.h5")}
    assert run("01234567", out="more").encoded == 1
    more = {file.name: file.stat().st_ino for file in (tmp_path / "more").glob("*.h5")}
    assert len(full) == len(more) == 3
    assert len(full.items() & more.items()) == 2, "the two full shards keep name and inode"


@pytest.mark.parametrize("numbers", ["0123567", "76543210", "31", "04", "2"])
def test_the_output_follows_from_the_data_not_from_history(run: Extract, tmp_path: Path, numbers: str) -> None:
    run("01234567")
    assert run(numbers, out="after").encoded == 0
    assert run(numbers, out="fresh", store="other").encoded == len(numbers)
    assert contents(tmp_path / "after") == contents(tmp_path / "fresh")


def test_another_layer_or_another_model_reuses_nothing(
    run: Extract, tmp_path: Path, vision_folders: dict[str, Path], encoders: dict[str, Encoder]
) -> None:
    run("0123")
    layer = Encoder(str(vision_folders["clip"]), layer=-2, precision="float32", device=torch.device("cpu"), batch=4)
    assert run("0123", out="layer", encoder=layer).encoded == 4
    assert run("0123", out="siglip", encoder=encoders["siglip"]).encoded == 4
    with pytest.raises(PipelineError, match="layer -1, params ask for -2"):
        FeatureStore(tmp_path / "out").check_encoder(layer.spec())
    FeatureStore(tmp_path / "layer").check_encoder(layer.spec())


def test_on_a_gpu_rows_of_another_call_size_are_others_but_may_be_trained_on(
    run: Extract, tmp_path: Path, vision_folders: dict[str, Path]
) -> None:
    """There the size chooses the kernel and so the last bits; only the name of the store is asked here, the sums are a CPU's."""
    encoders = [Encoder(str(vision_folders["clip"]), precision="float32", device=torch.device("cpu"), batch=n) for n in (2, 4)]
    one = encoders[0].row_spec()
    assert one == encoders[1].row_spec() == encoders[0].spec()
    for encoder in encoders:
        encoder.device = torch.device("cuda")
        assert run("0123", out=f"gpu{encoder.batch}", encoder=encoder).encoded == 4, "none is taken over"
        FeatureStore(tmp_path / f"gpu{encoder.batch}").check_encoder(one)
    assert run("0123", out="again", encoder=encoders[0]).encoded == 0


class Crashing(Encoder):
    """Ends the run after so many calls, as a full disk or a power cut would."""

    calls = 2

    def begin(self, pixels: torch.Tensor, names: Sequence[str]) -> Encoding:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().begin(pixels, names)


def test_a_run_after_a_crash_gives_the_bytes_of_an_undisturbed_one(
    run: Extract, tmp_path: Path, vision_folders: dict[str, Path]
) -> None:
    crashing = Crashing(str(vision_folders["clip"]), precision="float32", device=torch.device("cpu"), batch=2)
    with pytest.raises(KeyboardInterrupt):
        run("01234567", encoder=crashing)
    assert not (tmp_path / "out").exists()
    assert 0 < run("01234567").encoded < 8, "what was finished is taken over"
    run("01234567", out="fresh", store="other")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not list((tmp_path / "store").rglob("*.tmp"))


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_the_batch_size(
    run: Extract, tmp_path: Path, vision_folders: dict[str, Path], family: str, precision: str
) -> None:
    found = []
    for batch, numbers in ((1, "01234567"), (3, "01234567"), (8, "01234567"), (64, "01234567"), (64, "53716204"), (64, "42")):
        encoder = Encoder(str(vision_folders[family]), precision=precision, device=torch.device("cpu"), batch=batch)
        out = f"{batch}-{numbers}"
        run(numbers, out=out, store=f"store-{out}", encoder=encoder)
        found.append(by_hash(tmp_path / out))
    for other in found[1:]:
        assert other.items() <= found[0].items()


def test_workers_change_no_byte(run: Extract, tmp_path: Path) -> None:
    run("01234567")
    run("01234567", out="workers", store="other", workers=2)
    assert contents(tmp_path / "workers") == contents(tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named(tmp_path: Path, images: ImageRoot, encoders: dict[str, Encoder], workers: int) -> None:
    files, hashes = distinct_images([(images, ["0.png", "1.png", "bad.png", "2.png"])])
    with pytest.raises(ImageError, match=r"images: 'bad\.png': not a picture"):
        extract(files, hashes, encoders["clip"], stores=[tmp_path / "s"], out=tmp_path / "o", shard_rows=3, workers=workers)
    assert not (tmp_path / "o").exists()


def test_an_image_that_changes_while_it_is_read_is_named(tmp_path: Path, images: ImageRoot, encoders: dict[str, Encoder]) -> None:
    files, hashes = distinct_images([(images, ["0.png", "1.png"])])
    (Path(images.path) / "1.png").write_bytes((Path(images.path) / "2.png").read_bytes())
    with pytest.raises(PipelineError, match=r"1\.png': changed"):
        extract(files, hashes, encoders["clip"], stores=[tmp_path / "s"], out=tmp_path / "o", shard_rows=3, workers=0)


def test_features_that_overflow_float16_are_refused_and_named(
    tmp_path: Path, images: ImageRoot, vision_folders: dict[str, Path]
) -> None:
    encoder = Encoder(str(vision_folders["siglip"]), precision="float32", device=torch.device("cpu"), batch=4)
    with torch.no_grad():
        next(tensor for name, tensor in encoder.tower.named_parameters() if "post_layernorm.weight" in name).mul_(1e6)
    files, hashes = distinct_images([(images, ["0.png"])])
    with pytest.raises(PipelineError, match=r"0\.png': features are not finite in float16"):
        extract(files, hashes, encoder, stores=[tmp_path / "s"], out=tmp_path / "o", shard_rows=3, workers=0)


def broken_stores(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    first = sorted(folder.glob("*.h5"))[0]
    index = folder / INDEX
    yield first.name, first.unlink
    yield first.name, lambda: overwrite(first, b"")
    yield first.name, lambda: overwrite(first, sorted(folder.glob("*.h5"))[1].read_bytes())
    yield str(folder), index.unlink
    yield str(folder), lambda: index.write_text("{")
    yield str(folder), lambda: index.write_text("[]")
    yield str(folder), lambda: index.write_text('{"shards": [], "spec": {}}')
    yield str(folder), lambda: index.write_text(index.read_text().replace('"width": 32', '"width": 33'))


@pytest.mark.parametrize("number", range(8))
def test_a_store_that_is_not_whole_is_an_error_by_name(run: Extract, tmp_path: Path, number: int) -> None:
    run("01234")
    named, break_it = list(broken_stores(tmp_path / "out"))[number]
    break_it()
    with pytest.raises(PipelineError) as caught:
        by_hash(tmp_path / "out")
    assert named in caught.value.line()
    assert len(caught.value.line().splitlines()) == 1


@pytest.fixture
def world_files(world: World) -> tuple[list, np.ndarray]:
    return distinct_images([(world.images, [f"{number}.png" for number in range(6)])])


def test_rows_of_several_stores_are_taken_over_and_only_the_first_is_written(
    world_files: tuple[list, np.ndarray], encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    files, hashes = world_files
    clip, a, b = encoders["clip"], tmp_path / "a", tmp_path / "b"
    extract(files[:4], hashes[:4], clip, stores=[a], out=tmp_path / "first", shard_rows=3, workers=0)
    before = sorted(a.rglob("*.h5"))
    done = extract(files, hashes, clip, stores=[b, a], out=tmp_path / "both", shard_rows=3, workers=0)
    assert done.encoded == len(files) - 4
    assert sorted(a.rglob("*.h5")) == before
    extract(files, hashes, clip, stores=[tmp_path / "c"], out=tmp_path / "fresh", shard_rows=3, workers=0)
    assert [p.read_bytes() for p in sorted((tmp_path / "both").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "fresh").iterdir())
    ]


def test_rows_come_in_the_order_asked_whichever_shards_hold_them(
    world_files: tuple[list, np.ndarray], encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    files, hashes = world_files
    extract(files, hashes, encoders["clip"], stores=[tmp_path / "s"], out=tmp_path / "many", shard_rows=2, workers=0)
    extract(files, hashes, encoders["clip"], stores=[tmp_path / "s"], out=tmp_path / "one", shard_rows=99, workers=0)
    many, one = FeatureStore(tmp_path / "many"), FeatureStore(tmp_path / "one")
    numbers = np.random.default_rng(0).integers(0, len(files), 50)
    assert len(many.shards) > 1
    assert torch.equal(many.read(numbers), one.read(numbers))
    out = np.empty((50, *many.row_format.shape), many.row_format.dtype)
    many.read_into(numbers, out)
    assert torch.equal(torch.from_numpy(out), one.read(numbers))
    assert many.read(np.empty(0, np.int64)).shape == (0, *many.row_format.shape)


def test_images_that_no_shard_holds_are_found_missing_not_guessed(
    world_files: tuple[list, np.ndarray], encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    files, hashes = world_files
    extract(files[:3], hashes[:3], encoders["clip"], stores=[tmp_path / "s"], out=tmp_path / "o", shard_rows=2, workers=0)
    assert FeatureStore(tmp_path / "o").find(hashes[2:5]).tolist() == [2, -1, -1]
