"""Features on the device: a row's bits follow from its picture alone, stored ones are live ones, and copies read what was meant."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World
from gpu_device import DEVICE, NEEDS_GPU, ON_GPU, needs_gpu
from test_sources import BATCHES, loss_and_gradient
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from pipeline.features.decoding import DecodedImages
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.sources import LiveFeatures, StoredFeatures
from pipeline.features.store.store import FeatureStore
from pipeline.features.stream import FeatureStream

FAMILIES = ["clip", "siglip", pytest.param("clip-b16", marks=NEEDS_GPU)]
PRECISIONS = ["float32", "auto"]


@pytest.fixture(scope="module")
def towers(vision_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny towers and, for a GPU, one of CLIP ViT-B/16's shape: libraries choose other kernels for other shapes."""
    found = dict(vision_folders)
    if ON_GPU:
        found["clip-b16"] = tmp_path_factory.mktemp("clip-b16")
        torch.manual_seed(5)
        CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(found["clip-b16"])
        CLIPImageProcessorPil().save_pretrained(found["clip-b16"])
    return found


def pictures(encoder: Encoder, count: int) -> torch.Tensor:
    """uint8 [count, 3, side, side], each another noise."""
    side = encoder.tower.config.image_size
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def encode(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """Rows of pictures as they would be stored."""
    return encoder.encode_rows(pixels, [str(number) for number in range(len(pixels))])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [8, pytest.param(64, marks=NEEDS_GPU), pytest.param(256, marks=NEEDS_GPU)])
def test_a_row_has_the_same_bits_in_every_place_with_any_mates_and_in_a_partial_batch(
    towers: dict[str, Path], family: str, precision: str, batch: int
) -> None:
    """One picture in all places at once gives equal rows; rows move with their pictures; what is left out changes no other."""
    encoder = Encoder(str(towers[family]), precision=precision, device=DEVICE, batch=batch)
    pixels = pictures(encoder, batch)
    rows = encode(encoder, pixels)
    everywhere = encode(encoder, pixels[:1].expand_as(pixels))
    assert all(torch.equal(row, rows[0]) for row in everywhere)
    for shift in (1, 3, batch // 2, batch - 1):
        assert torch.equal(encode(encoder, pixels.roll(shift, 0)), rows.roll(shift, 0)), f"moved by {shift}"
    for count in (1, 2, batch - 1):
        assert torch.equal(encode(encoder, pixels[:count]), rows[:count]), f"{count} of {batch}"
        assert torch.equal(encode(encoder, pixels[-count:]), rows[-count:]), f"the last {count} of {batch}"
    assert not torch.equal(rows[0], rows[1]), "other pictures have other rows"


@pytest.mark.xfail(ON_GPU, reason="cuBLAS takes other kernels for another runtime.extract_batch", strict=False)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_bits_whatever_the_size_of_the_batch(towers: dict[str, Path], family: str, precision: str) -> None:
    """So on a CPU; on a GPU they need not, so there the size is part of the store's name."""
    found = []
    for batch in (16, 5, 1):
        encoder = Encoder(str(towers[family]), precision=precision, device=DEVICE, batch=batch)
        found.append(encode(encoder, pictures(encoder, 16)))
    assert all(torch.equal(other, found[0]) for other in found[1:])


def two_sources(world: World, folder: Path, tower: Path, precision: str, storage: str) -> tuple[StoredFeatures, LiveFeatures]:
    """Stored and live features of the world's pictures, both from the device."""
    files, hashes = distinct_images([(world.images, [f"{number}.png" for number in (5, 3, 1, 0, 2, 4)])])
    encoder = Encoder(str(tower), precision=precision, storage=storage, device=DEVICE, batch=4)
    extract(files, hashes, encoder, stores=[folder / "store"], out=folder / "out", shard_rows=4, workers=0)
    again = Encoder(str(tower), precision=precision, storage=storage, device=DEVICE, batch=4)
    stored = StoredFeatures(FeatureStore(folder / "out"), world.table, DEVICE)
    return stored, LiveFeatures(again, world.images, world.table)


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_stored_and_live_features_give_the_same_bits(
    world: World, vision_folders: dict[str, Path], tmp_path: Path, family: str, precision: str, storage: str
) -> None:
    """The features themselves, and loss and gradient of every kind of batch."""
    stored, live = two_sources(world, tmp_path, vision_folders[family], precision, storage)
    slots = np.arange(world.table.slots)
    assert torch.equal(stored.features(stored.load(slots)).cpu(), live.features(live.load(slots)).cpu())
    model = world.model("projector").to(DEVICE)
    for name, rows in BATCHES.items():
        ours = loss_and_gradient(world, model, stored, rows, DEVICE)
        theirs = loss_and_gradient(world, model, live, rows, DEVICE)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)), name


def test_a_buffer_is_not_used_again_before_its_copy_has_ended(world: World) -> None:
    """Memory that comes free is filled with poison while copies of it may still wait: none of it ever reaches the features."""
    source, slots = StoredFeatures(world.store, world.table, DEVICE), np.arange(world.table.slots)
    expected = world.store.read(world.store.locate(world.table.image_hashes()))
    found, wanted = [], []
    for attempt in range(20):
        if ON_GPU:
            torch.cuda._sleep(20_000_000)  # about 10 ms of the card's time, in which no copy can start
        part = np.roll(slots, attempt)[: 3 + attempt % 5]
        found.append(source.features(source.load(part)))
        wanted.append(expected[part])
        for _ in range(2):
            source._pool.take(len(slots)).fill_(float("nan"))
    assert all(torch.equal(features.cpu(), rows) for features, rows in zip(found, wanted, strict=True))


@needs_gpu
def test_rows_are_read_into_pinned_memory_that_the_card_copies_from_by_itself(world: World) -> None:
    """The host goes on while the card is busy with something else."""
    source, slots = StoredFeatures(world.store, world.table, DEVICE), np.arange(world.table.slots)
    loaded = source.load(slots)
    assert loaded.is_pinned()
    source.features(loaded)  # the card's memory for it is there from now on
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    busy = torch.cuda.Event()
    busy.record()
    source.features(loaded)
    assert not busy.query(), "the copy was waited for"
    torch.cuda.synchronize()


def test_extraction_on_the_device_writes_the_same_bytes_twice(
    world: World, vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two stores that know nothing of each other hold the same files."""
    found = []
    for name in ("one", "other"):
        two_sources(world, tmp_path / name, vision_folders["clip"], "auto", "float16")
        found.append({path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()})
    assert found[0] == found[1]


def test_rows_of_many_batches_under_way_are_those_of_one_after_the_other(world: World, vision_folders: dict[str, Path]) -> None:
    """Pictures go up and rows come down beside the computation, through pinned memory that is used again and again."""
    encoder = Encoder(str(vision_folders["clip"]), precision="auto", device=DEVICE, batch=2)
    files, hashes = distinct_images([(world.images, [f"{number}.png" for number in range(6)])])
    expected = encoder.encode_rows(
        torch.from_numpy(np.stack([encoder.preprocess(file.root.read(file.name), where=file.name) for file in files])),
        list("012345"),
    ).cpu()
    stream = FeatureStream(DecodedImages(files, hashes, encoder.preprocess), encoder, 0, skip=False, total=240, quiet=True)
    order = np.random.default_rng(0).integers(0, 6, 240).tolist()
    stream.begin(order)
    for number in order:
        if ON_GPU:
            torch.cuda._sleep(200_000)  # the card has other work in between
        assert torch.equal(torch.from_numpy(next(stream)), expected[number])
    stream.close()
