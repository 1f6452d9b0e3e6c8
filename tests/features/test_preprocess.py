"""Every switch of an image processor is honoured exactly as Transformers does, or refused by name before the first batch."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pipeline.core.errors import PipelineError
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.preprocess import Preprocessor

HONOURED: dict[str, dict[str, Any]] = {
    "as saved": {},
    "nearest": {"resample": 0},
    "bilinear": {"resample": 2},
    "lanczos": {"resample": 1},
    "box": {"resample": 4},
    "both sides": {"size": {"height": 32, "width": 32}},
    "a number": {"size": 32},
    "a number to crop": {"crop_size": 32},
    "larger, then cropped": {"size": {"shortest_edge": 50}},
    "no resize": {"do_resize": False},  # cropped, or filled up with black where it is smaller
    "no crop of a square": {"do_center_crop": False, "size": {"height": 32, "width": 32}},
    "no rescale": {"do_rescale": False},
    "other factor": {"rescale_factor": 1 / 127.5},
    "no normalize": {"do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "one mean for all": {"image_mean": 0.4, "image_std": 0.3},
    "other means": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    "no conversion": {"do_convert_rgb": False},
    "fast": {"use_fast": True},
    "fast class": {"image_processor_type": "CLIPImageProcessorFast"},
    "old class": {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
    "padding that is none": {"do_pad": True, "pad_size": {"height": 32, "width": 32}},
    "a format": {"data_format": "channels_first", "input_data_format": None},
    "unknown keys": {"do_magic": True, "feature_extractor_type": "CLIPFeatureExtractor"},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no crop": ({"do_center_crop": False}, r"makes pictures of \d+ x \d+ pixels, the tower takes 32"),
    "longest edge": ({"do_center_crop": False, "size": {"shortest_edge": 32, "longest_edge": 64}}, "the tower takes 32"),
    "at most": ({"do_center_crop": False, "size": {"max_height": 32, "max_width": 32}}, "the tower takes 32"),
    "not square": ({"crop_size": {"height": 32, "width": 16}}, "makes pictures of 32 x 16"),
    "nothing": ({"do_resize": False, "do_center_crop": False}, "the tower takes 32"),
    "padding": ({"do_pad": True, "pad_size": {"height": 64, "width": 64}}, r"more than resizing.*do_pad: True"),
    "padding too small": ({"do_pad": True, "pad_size": {"height": 8, "width": 8}}, "cannot be followed"),
    "means of four": ({"image_mean": [0, 0, 0, 0]}, "3 channels|cannot be followed"),
    "no spread": ({"image_std": [0, 0, 0]}, "gives no number"),
    "means as text": ({"image_mean": "half"}, "cannot load|cannot be followed"),
    "a factor of text": ({"rescale_factor": "a"}, "cannot load|cannot be followed"),
    "no factor": ({"rescale_factor": None}, "cannot load|cannot be followed"),
    "no such filter": ({"resample": 77}, "cannot load|cannot be followed"),
    "a side of text": ({"size": {"height": "x", "width": "y"}}, "cannot load|cannot be followed"),
    "no side": ({"size": {}}, "cannot load|cannot be followed"),
    "a negative side": ({"size": {"shortest_edge": -5}}, "cannot load|cannot be followed"),
    "a huge side": ({"size": {"height": 10**6, "width": 10**6}}, "more than 4,096 pixels"),
    "a huge crop": ({"crop_size": {"height": 10**6, "width": 10**6}}, "more than 4,096 pixels"),
    "no class": ({"image_processor_type": "os.system"}, "cannot load"),
    "a number for a class": ({"image_processor_type": 7}, "cannot load"),
    "code": ({"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}, "cannot load"),
}


def changed(folder: Path, to: Path, **changes: Any) -> str:
    shutil.copytree(folder, to)
    path = next(path for path in (to / "preprocessor_config.json", to / "processor_config.json") if path.exists())
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(to)


@pytest.mark.parametrize("name", HONOURED)
def test_a_switch_is_honoured_as_transformers_does(name: str, vision_folders: dict[str, Path], tmp_path: Path) -> None:
    model = changed(vision_folders["clip"], tmp_path / "clip", **HONOURED[name])
    ours, stock = Preprocessor(model), AutoImageProcessor.from_pretrained(model, backend="pil")
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (ours.mean, ours.std))
    for size in ((70, 33), (33, 70), (32, 32), (5, 9)):
        picture = Image.fromarray(np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        file = io.BytesIO()
        picture.save(file, "PNG")
        wanted = stock(picture, return_tensors="np")["pixel_values"][0]
        found = (ours(file.getvalue(), where="x").astype(np.float64) * ours.rescale - mean) / std
        assert found.shape == wanted.shape == (3, 32, 32)
        assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())
    assert Encoder(model, precision="float32", device=CPU, batch=1).tokens == 16


@pytest.mark.parametrize("name", REFUSED)
def test_a_switch_that_cannot_be_honoured_is_refused_before_the_first_batch(
    name: str, vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    changes, said = REFUSED[name]
    model = changed(vision_folders["clip"], tmp_path / "clip", **changes)
    with pytest.raises(PipelineError, match=said) as caught:
        Encoder(model, precision="float32", device=CPU, batch=1)
    assert "\n" not in caught.value.line()
    assert model in caught.value.line()


@pytest.mark.parametrize("text", ["[]", "7", "null", '"x"', "{", "", "[" * 100_000, '{"size": ' * 5000])
def test_a_file_that_is_no_processor_is_one_line(text: str, vision_folders: dict[str, Path], tmp_path: Path) -> None:
    model = changed(vision_folders["siglip"], tmp_path / "siglip")
    next(path for path in Path(model).glob("*processor_config.json")).write_text(text)
    with pytest.raises(PipelineError, match=r"^vision\.model: cannot load"):
        Preprocessor(model)
