"""The encoder's square lies where the preprocessor took it from, in pictures of any shape, and heat is drawn there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from pipeline.features import Preprocessor
from pipeline.saliency import Box, draw_sheet, find_box
from pipeline.saliency.heatmap import CELL, GAP, LINE

WAYS: dict[str, dict[str, Any]] = {
    "crop": {},
    "stretch": {"size": {"height": 32, "width": 32}},
    "nearest": {"resample": 0},
    "larger, then cropped": {"size": {"shortest_edge": 64}},
    "no resize": {"do_resize": False},
    "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "processor_class": None},
}
WIDE, TALL = (400, 200), (150, 300)
EXPECTED = {
    "crop": {WIDE: (100, 0, 300, 200), TALL: (0, 75, 150, 225)},
    "stretch": {WIDE: (0, 0, 400, 200), TALL: (0, 0, 150, 300)},
    "nearest": {WIDE: (100, 0, 300, 200), TALL: (0, 75, 150, 225)},
    "larger, then cropped": {WIDE: (150, 50, 250, 150), TALL: (37.5, 112.5, 112.5, 187.5)},
    "no resize": {WIDE: (184, 84, 216, 116), TALL: (59, 134, 91, 166), (8, 16): (-12, -8, 20, 24)},
    "pad": {WIDE: (0, -100, 400, 300), TALL: (-75, 0, 225, 300)},
}


def preprocessor(folder: Path, settings: dict[str, Any]) -> Preprocessor:
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return Preprocessor(str(folder))


@pytest.mark.parametrize("way", WAYS)
def test_the_box_is_what_the_encoder_sees(tmp_path: Path, way: str) -> None:
    made = preprocessor(tmp_path, WAYS[way])
    for size, expected in EXPECTED[way].items():
        box = find_box(made, size)
        scale = max(expected[2] - expected[0], expected[3] - expected[1]) / 32  # of a pixel of the encoder's
        assert (box.left, box.top, box.right, box.bottom) == pytest.approx(expected, abs=0.75 * scale), (way, size)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (640, 4), (1500, 1000)])
def test_any_size_has_a_box(tmp_path: Path, size: tuple[int, int]) -> None:
    box = find_box(preprocessor(tmp_path, {}), size)
    short, (across, down) = min(size), (box.right - box.left, box.bottom - box.top)
    assert (across, down) == pytest.approx((short, short), rel=0.1, abs=0.5)
    assert (box.left + box.right, box.top + box.bottom) == pytest.approx(size, abs=max(1.0, 0.05 * short))


def test_heat_lies_on_its_patch_of_a_picture_that_is_not_square() -> None:
    picture, heat = Image.new("RGB", (400, 200), "white"), np.zeros((1, 1, 4, 4), np.float32)
    heat[0, 0, 1, 2] = 1
    sheet = draw_sheet([picture], [Box(100, 0, 300, 200)], ["red"], [("by hand", heat)])
    left, top, scale = GAP + CELL + GAP, GAP + LINE + LINE, CELL / 400
    cell = np.asarray(sheet.crop((left, top, left + CELL, top + CELL // 2))).astype(int)
    middle = lambda x, y: tuple(cell[round(y * scale), round(x * scale)])  # noqa: E731
    assert middle(225, 75)[2] < 150  # the patch at row 1, column 2 of the square, which begins 100 pixels into the picture
    assert middle(175, 75) == middle(225, 125) == middle(275, 75) == (255, 255, 255)
    assert middle(50, 75) == middle(350, 75) != (255, 255, 255)  # cropped away: greyed


def test_many_words_and_pictures_make_lines_and_odd_words_are_drawn() -> None:
    pictures = [Image.new("RGB", size, "grey") for size in ((30, 90), (64, 64))]
    words = [f"word{number}" for number in range(11)] + ["红色", "x" * 200, "\u200b"]
    heat = np.zeros((len(words), 2, 2, 2), np.float32)
    sheet = draw_sheet(pictures, [Box(0, 0, 30, 30), Box(0, 0, 64, 64)], words, [("one", heat), ("two", heat)])
    assert sheet.width == 6 * (CELL + GAP) + GAP
    assert sheet.height > 2 * 3 * 2 * CELL
