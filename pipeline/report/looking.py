"""Heat maps of the gallery's answers: which patches each word came from, as tiny pictures that lie over the thumbnails."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.chat.assistant import Assistant, user_turn
from pipeline.chat.look import look_back
from pipeline.core import PipelineError
from pipeline.params import Dataset
from pipeline.records import Turn, decode, open_dataset
from pipeline.saliency import GRADIENT, ROLLOUT, Box, Seen, find_box, heat_layer

WORDS = 8  # of an answer that have a map
MOST = 2 << 20  # letters of all maps together: the page stays under 5 MB
WIDE, TALL = 6.0, 9.0  # of a thumbnail, in the page's units


def add_heat(cards: list[dict[str, Any]], dataset: Dataset, model: Path) -> str:
    """Give each card `heat`, what `page.js` shows of it: words, a list of pictures for each way of looking, and where they lie.

    A first question is asked again as a person would ask it: its pictures, then its words. Later turns, and what is beyond `MOST`,
    have no map. Returns why the first that is missing is. Raises `PipelineError` where the model cannot be loaded.
    """
    images, assistant = open_dataset(dataset, limit=0).images, Assistant(model)
    problem, methods, held = "", [ROLLOUT, GRADIENT], 0
    for card in cards:
        if card["turn"] > 1 or not card["pictures"] or not all(card["pictures"]) or len(card["names"]) > len(card["pictures"]):
            continue
        if held > MOST:
            return problem or f"only the first {held / 1e6:.1f} MB of maps are shown"
        files = [images.read(name) for name in card["names"]]
        turns = [user_turn(card["asked"], range(len(files))), Turn("assistant", (card["said"] or " ",))]
        try:
            seen = look_back(assistant, turns, files, methods)
        except PipelineError as error:
            problem = problem or error.line()
            if ROLLOUT not in methods or "traced back" not in error.what:
                continue
            methods = [GRADIENT]
            seen = look_back(assistant, turns, files, methods)
        sizes = [decode(data, where=name).size for data, name in zip(files, card["names"], strict=True)]
        boxes = [find_box(assistant.encoder.members[0].preprocess, size) for size in sizes]
        card["heat"] = _heat(seen, sizes, boxes)
        held += sum(len(picture) for method in methods for word in card["heat"][method] for picture in word)
    return problem


def _heat(seen: Seen, sizes: list[tuple[int, int]], boxes: list[Box]) -> dict[str, Any]:
    pairs = list(zip(sizes, boxes, strict=True))
    return {
        "words": seen.words[:WORDS],
        "widths": [round(min(WIDE, TALL * width / height), 2) for width, height in sizes],
        "places": [
            [
                round(100 * number, 2)
                for number in (
                    box.left / width, box.top / height, (box.right - box.left) / width, (box.bottom - box.top) / height,
                )
            ]
            for (width, height), box in pairs
        ],
        **{maps.method: [[_url(heat, float(word.max())) for heat in word] for word in maps.heat[:WORDS]] for maps in seen.maps},
    }  # fmt: skip


def _url(heat: np.ndarray, most: float) -> str:
    """A map [grid, grid] as a picture of as many pixels."""
    file = io.BytesIO()
    layer = heat_layer(heat, most)
    layer.quantize(64, method=Image.Quantize.FASTOCTREE).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
