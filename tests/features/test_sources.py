"""Cached = live: loss and gradient bit for bit; and both are what Transformers itself computes for the picture."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, PATCHES, WIDTH, World
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pipeline.core.errors import PipelineError
from pipeline.core.fingerprint import fingerprint
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder import encoder as encoder_module
from pipeline.features.encoder import encoding
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.tower import load_tower
from pipeline.features.extraction import extract
from pipeline.features.sources import FeatureSource, LiveFeatures, NoFeatures, StoredFeatures
from pipeline.features.store.store import FeatureStore
from pipeline.records.decoder import decode
from pipeline.records.images import ImageRoot
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.model.vlm import VisionLanguageModel

# rows of the world: with one picture, with two, with one twice, with none, with one that another row of the batch shows too
BATCHES = {"one": [0], "two in a row": [2], "one twice in a row": [3], "one in two rows": [0, 6, 7], "none": [4, 9],
           "every row": list(range(11)), "every row, backwards": list(range(10, -1, -1))}  # fmt: skip


def loss_and_gradient(
    world: World, model: VisionLanguageModel, source: FeatureSource, rows: list[int], device: torch.device = CPU
) -> list[torch.Tensor]:
    batch = collate(world.table, np.array(rows), image_id=world.builder.image_id, tokens=source.tokens)
    loss, _ = model(batch.to(device), source.features(source.load(batch.slots)).to(device))
    parameters = list(model.projector.parameters())
    if not loss.requires_grad:
        return [loss]
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]


@pytest.fixture(scope="module")
def pairs(
    world: World, vision_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[StoredFeatures, LiveFeatures]]:
    """Stored and live features of each family of encoders, the live one with another batch size."""
    found = {}
    for family, folder in vision_folders.items():
        for precision in ("float32", "auto"):
            here = tmp_path_factory.mktemp("store")
            files, hashes = distinct_images([(world.images, [f"{number}.png" for number in (5, 3, 1, 0, 2, 4)])])
            encoder = Encoder(str(folder), precision=precision, device=CPU, batch=4)
            extract(files, hashes, encoder, stores=[here / "store"], out=here / "out", shard_rows=4, workers=0)
            live = LiveFeatures(Encoder(str(folder), precision=precision, device=CPU, batch=3), world.images, world.table)
            found[family, precision] = StoredFeatures(FeatureStore(here / "out"), world.table), live
    return found


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_stored_and_live_features_give_the_same_bits_of_loss_and_gradient(
    world: World, pairs: dict[tuple[str, str], tuple[FeatureSource, FeatureSource]], rows: str, family: str, precision: str
) -> None:
    stored, live = pairs[family, precision]
    model = world.model("projector")
    ours = loss_and_gradient(world, model, stored, BATCHES[rows])
    theirs = loss_and_gradient(world, model, live, BATCHES[rows])
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    blind = loss_and_gradient(world, model, NoFeatures(stored), BATCHES[rows])
    assert torch.equal(ours[0], blind[0]) == (rows == "none"), "the pictures count"


def test_both_sources_answer_slot_by_slot(world: World, pairs: dict[tuple[str, str], tuple[FeatureSource, FeatureSource]]) -> None:
    names = world.table.image_names().to_pylist()
    encoder = Encoder(world.clip.name, precision="float32", device=CPU, batch=4)
    expected = {name: encoder.encode_files([world.images.read(name)], [name])[0] for name in set(names)}
    slots = np.array([9, 0, 3, 3, 5, 4, 2])
    for source in pairs["clip", "float32"]:
        features = source.features(source.load(slots))
        assert features.dtype == torch.float16
        assert (source.tokens, source.width) == (PATCHES, WIDTH)
        assert torch.equal(features, torch.stack([expected[names[slot]] for slot in slots]))
        assert source.features(source.load(slots[:0])).shape == (0, PATCHES, WIDTH)


def test_the_blind_control_is_all_zeros_of_the_same_shape(world: World) -> None:
    blind = NoFeatures(StoredFeatures(world.store, world.table))
    features = blind.features(blind.load(np.array([1, 2, 1])))
    assert features.shape == (3, PATCHES, WIDTH)
    assert features.dtype == torch.float16
    assert not features.any()


class Counting(Encoder):
    seen, calls = 0, 0

    def encode(self, pixels: torch.Tensor, names: Any) -> torch.Tensor:
        self.seen, self.calls = self.seen + len(pixels), self.calls + 1
        return super().encode(pixels, names)


def test_a_picture_that_stands_twice_in_a_batch_is_encoded_once(world: World) -> None:
    encoder = Counting(world.clip.name, precision="float32", device=CPU, batch=4)
    live = LiveFeatures(encoder, world.images, world.table)
    slots = np.arange(world.table.slots)
    live.features(live.load(slots))
    assert encoder.seen == len(set(world.table.image_names().to_pylist())) < len(slots)


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_the_live_encoder_looks_ahead_until_its_batch_is_full(world: World, cache_bytes: int) -> None:
    encoder = Counting(world.clip.name, precision="float32", device=CPU, batch=4)
    live = LiveFeatures(encoder, world.images, world.table, cache_bytes=cache_bytes)
    parts = [np.array(part, np.int64) for part in ([0], [], [1, 0], [2, 3], [0, 9], [4], [])]
    loaded = [(number, live.load(part)) for number, part in enumerate(parts)]
    found = list(live.stream(loaded))
    assert [number for number, _ in found] == list(range(len(parts)))
    distinct = {world.table.image_names()[slot].as_py() for part in parts for slot in part.tolist()}
    assert encoder.seen == len(distinct) if cache_bytes else encoder.seen < sum(map(len, parts))
    assert encoder.calls == -(-encoder.seen // 4), "full batches only, but for the last"
    for (_, features), part in zip(found, parts, strict=True):
        assert torch.equal(features, live.features(live.load(part)))


@pytest.mark.parametrize(("change", "said"), [("other bytes", "not those that were tokenised"), ("gone", "no such image")])
def test_an_image_that_changed_since_it_was_tokenised_is_named(world: World, tmp_path: Path, change: str, said: str) -> None:
    shutil.copytree(world.images.path, tmp_path / "images")
    if change == "gone":
        (tmp_path / "images" / "2.png").unlink()
    else:
        shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "2.png")
    live = LiveFeatures(world.clip, ImageRoot(tmp_path / "images"), world.table)
    with pytest.raises(PipelineError, match=rf"2\.png.*{said}"):
        live.load(np.arange(world.table.slots))


def test_a_store_without_an_image_is_refused_before_training(world: World, tmp_path: Path) -> None:
    files, hashes = distinct_images([(world.images, ["0.png", "1.png"])])
    extract(files, hashes, world.clip, stores=[tmp_path / "store"], out=tmp_path / "out", shard_rows=4, workers=0)
    with pytest.raises(PipelineError, match=r"no features for \d of 12 images"):
        StoredFeatures(FeatureStore(tmp_path / "out"), world.table)


def test_live_rows_stay_on_the_device_from_the_pixels_to_the_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, whose tensors can be computed with and hold nothing: whatever is copied back from it is an error."""
    encoder, meta = Encoder(world.clip.name, precision="float32", device=CPU, batch=4), torch.device("meta")
    encoder.to(meta)
    encoder.device, encoder._mean, encoder._std = meta, encoder._mean.to(meta), encoder._std.to(meta)
    monkeypatch.setattr(encoder_module, "autocast", lambda *_: nullcontext())
    asked = []  # the one thing that is read: a flag a call, whether all is finite
    monkeypatch.setattr(encoding, "require_finite", lambda finite, _: asked.append(finite.device))
    live = LiveFeatures(encoder, world.images, world.table, cache_bytes=10**9)
    loaded = [(number, live.load(np.array(part))) for number, part in enumerate(([0, 1], [2, 0], [3, 4, 1]))]
    with pytest.raises(NotImplementedError, match="no data"):
        torch.empty(1, device=meta).cpu()
    for _ in range(2):  # the second time from the cache
        found = list(live.stream(loaded))
        assert [tuple(features.shape) for _, features in found] == [(n, PATCHES, WIDTH) for n in (2, 2, 3)]
        assert {features.device for _, features in found} == {meta}
    assert set(asked) == {meta}
    assert live.features(live.load(np.empty(0, np.int64))).device == meta


SETTINGS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "other mean and scale": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 100},
    "squeezed": {"do_center_crop": False, "size": {"height": 32, "width": 32}, "resample": 2},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
}


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("settings", "layer"), [*((name, -1) for name in SETTINGS), *(("as shipped", layer) for layer in (-2, 0, 1))]
)
def test_features_are_the_patch_states_that_transformers_computes(
    tmp_path: Path, vision_folders: dict[str, Path], png: Callable[[int], bytes], family: str, settings: str, layer: int
) -> None:
    shutil.copytree(vision_folders[family], tmp_path / family)
    processor = AutoImageProcessor.from_pretrained(vision_folders[family], backend="pil")
    processor = type(processor)(**{**processor.to_dict(), **SETTINGS[settings]})
    processor.save_pretrained(tmp_path / family)
    try:
        encoder = Encoder(str(tmp_path / family), layer=layer, precision="float32", device=CPU, batch=2)
    except PipelineError:
        assert settings.startswith("not "), "an unusual processor may be refused, never run wrongly"
        return
    found = encoder.encode_files([png(0), png(1), png(2)], ["0", "1", "2"])
    inputs = processor([decode(png(number), where="x") for number in range(3)], return_tensors="pt")
    with torch.inference_mode():
        output = load_tower(str(tmp_path / family), "").eval()(**inputs, output_hidden_states=True)
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    expected = states[:, 1:] if family == "clip" else states
    assert found.shape == (3, PATCHES, WIDTH)
    assert torch.allclose(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_the_fingerprint_follows_from_what_decides_the_features(tmp_path: Path, vision_folders: dict[str, Path]) -> None:
    shutil.copytree(vision_folders["clip"], tmp_path / "copy")

    def name(folder: Path, **options: Any) -> str:
        return fingerprint(Encoder(str(folder), device=CPU, **{"precision": "float32", **options}).spec())

    same = name(vision_folders["clip"])
    assert same == name(tmp_path / "copy", batch=7)
    others = [
        name(vision_folders["clip"], layer=-2),
        name(vision_folders["clip"], precision="bfloat16"),
        name(vision_folders["siglip"]),
    ]
    settings = (tmp_path / "copy" / "preprocessor_config.json").read_text()
    (tmp_path / "copy" / "preprocessor_config.json").write_text(settings.replace('"resample": 3', '"resample": 2'))
    others.append(name(tmp_path / "copy"))
    assert len({same, *others}) == 5


@pytest.mark.parametrize("kind", ["no folder", "a language model", "weights cut", "no image processor"])
def test_an_encoder_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, vision_folders: dict[str, Path], llm_folder: Path, kind: str
) -> None:
    folder = tmp_path / "clip"
    if kind == "a language model":
        folder = llm_folder
    elif kind != "no folder":
        shutil.copytree(vision_folders["clip"], folder)
        weights = folder / "model.safetensors"
        if kind == "weights cut":
            weights.write_bytes(weights.read_bytes()[:5000])
        else:
            (folder / "preprocessor_config.json").unlink()
    with pytest.raises(PipelineError) as caught:
        Encoder(str(folder), precision="float32", device=CPU)
    assert str(folder) in caught.value.line()
    assert len(caught.value.line().splitlines()) == 1


@pytest.mark.parametrize("layer", [3, -4])
def test_an_impossible_layer_is_refused_with_the_number_there_are(vision_folders: dict[str, Path], layer: int) -> None:
    with pytest.raises(PipelineError, match=rf"vision\.layer is {layer}; .* has 2 layers"):
        Encoder(str(vision_folders["clip"]), layer=layer, precision="float32", device=CPU)
