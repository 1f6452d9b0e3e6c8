"""A small picture out of half blocks, for terminals that show colours."""

import numpy as np
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

from pipeline.records import decode

COLUMNS, LINES = 32, 12  # at most; a block is two pixels high


def thumbnail(data: bytes, *, where: str) -> Text:
    """The picture in a file, at most 32 columns by 12 lines; raises `ImageError` as every decoding does."""
    picture = decode(data, where=where)
    scale = min(COLUMNS / picture.width, 2 * LINES / picture.height)
    width, height = max(1, round(picture.width * scale)), max(2, round(picture.height * scale / 2) * 2)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    text = Text(no_wrap=True, end="")
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        text.append("\n")
    return text
