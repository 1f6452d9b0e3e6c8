"""Heat maps over their pictures, as one sheet: a line a picture and method, a cell a word."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.saliency.placement import Box

CELL, GAP, LINE, LETTERS = 208, 10, 20, 13  # pixels: side of a cell, between cells, of a line of text, of its letters
COLD, WARM, HOT = "#2a1a8a", "#e0405a", "#ffe14d"
INK, PAPER, UNSEEN = "#1d232b", "#ffffff", (120, 120, 120, 170)
STRONG = 225  # of 255: how much a patch of the most heat covers the picture


def heat_layer(heat: np.ndarray, most: float) -> Image.Image:
    """A map [grid, grid] as an RGBA picture of grid x grid pixels: without colour where it is 0, hottest at `most`."""
    level = Image.fromarray(np.round(255 * np.clip(heat / (most or 1.0), 0, 1)).astype(np.uint8))
    layer = ImageOps.colorize(level, black=COLD, mid=WARM, white=HOT).convert("RGBA")
    layer.putalpha(level.point([round(STRONG * (value / 255) ** 0.6) for value in range(256)]))
    return layer


def draw_sheet(
    pictures: Sequence[Image.Image],
    boxes: Sequence[Box],
    words: Sequence[str],
    lines: Sequence[tuple[str, np.ndarray]],
    *,
    across: int = 6,
) -> Image.Image:
    """All of an answer's maps.

    Args:
        pictures: as they were shown; boxes: what of each the model sees, the rest is greyed.
        lines: what each method is called, and its heat [W, S, grid, grid]; colours are scaled to a word's hottest patch.
        across: cells side by side, at least two: the picture itself and a word.
    """
    small = [_fitted(picture) for picture in pictures]
    font = ImageFont.load_default(LETTERS)
    columns = min(across, len(words) + 1)
    bands = [range(start, min(start + columns - 1, len(words))) for start in range(0, len(words), columns - 1)]
    tall = [picture.height + LINE for picture in small]
    height = len(lines) * len(bands) * (sum(tall) + LINE + GAP) + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, height), PAPER)
    pen, top = ImageDraw.Draw(sheet), GAP
    for title, heat in lines:
        for band in bands:
            pen.text((GAP, top), title, fill=INK, font=font)
            top += LINE
            for s, picture in enumerate(small):
                sheet.paste(picture, (GAP, top + LINE))
                for place, number in enumerate(band, 1):
                    left = GAP + place * (CELL + GAP)
                    share = f"{heat[number, s].sum():.0%}  " if len(small) > 1 else ""
                    pen.text((left, top + 2), _fitting(f"{share}{words[number]}", font), fill=INK, font=font)
                    drawn = _over(picture, pictures[s].size, boxes[s], heat_layer(heat[number, s], float(heat[number].max())))
                    sheet.paste(drawn, (left, top + LINE))
                top += tall[s]
            top += GAP
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    """Large ones smaller and small ones larger, so that the longer side is a cell's."""
    scale = CELL / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _over(picture: Image.Image, size: tuple[int, int], box: Box, layer: Image.Image) -> Image.Image:
    """The layer where the box lies, on a picture that was `size` before it was fitted."""
    wide, tall = picture.width / size[0], picture.height / size[1]
    left, top, right, bottom = round(box.left * wide), round(box.top * tall), round(box.right * wide), round(box.bottom * tall)
    patches = layer.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.NEAREST)
    whole = Image.new("RGBA", picture.size, UNSEEN)
    whole.paste(patches, (left, top))
    return Image.alpha_composite(picture.convert("RGBA"), whole).convert("RGB")


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a caption as its cell holds."""
    text = "".join(letter for letter in text if letter.isprintable())
    while font.getlength(text) > CELL and text:
        text = text[:-2] + "…" if len(text) > 1 else ""
    return text
