"""Where the square that the encoder sees lies in the picture, whatever its preprocessor does: resize, crop, pad.

Found out by giving the preprocessor a picture of the same size whose colours are its own coordinates: what comes out says where
it came from. So no list of settings has to be followed.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.features import Preprocessor

EDGE = 12  # levels at both ends of a ramp that resampling bends
INSIDE = 250  # of 255 in the third channel: what is less is padding, or mixed with it


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the upright picture; beyond its edges where the preprocessor pads, within them where it crops."""

    left: float
    top: float
    right: float
    bottom: float


def find_box(preprocess: Preprocessor, size: tuple[int, int]) -> Box:
    """The part of a picture (width, height) that becomes the encoder's square."""
    width, height = size
    across, down = (np.round(255 * (np.arange(side) + 0.5) / side).astype(np.uint8) for side in (width, height))
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[..., 0], picture[..., 1] = across[None], down[:, None]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    seen = preprocess(file.getvalue(), where="a ramp").astype(np.float64)  # [3, side, side]
    inside = seen[2] >= INSIDE
    left, right = _line(_means(seen[0], inside, 0), width)
    top, bottom = _line(_means(seen[1], inside, 1), height)
    return Box(left, top, right, bottom)


def _means(levels: np.ndarray, inside: np.ndarray, axis: int) -> np.ndarray:
    """Level of each column (axis 0) or row (axis 1) of the square; not-a-number where all of it is padding."""
    counts = inside.sum(axis)
    return np.where(counts > 0, (levels * inside).sum(axis) / np.maximum(counts, 1), np.nan)


def _line(levels: np.ndarray, side: int) -> tuple[float, float]:
    """Where the first and the last edge of the square lie on a side of the picture, by a line through the levels."""
    known = np.isfinite(levels)
    straight = known & (levels >= EDGE) & (levels <= 255 - EDGE)
    if straight.sum() < 2 or np.ptp(levels[straight]) < 1:  # a side of a pixel or two
        where = np.flatnonzero(known)
        first, count = (int(where[0]), len(where)) if len(where) else (0, len(levels))
        return -first * side / count, (len(levels) - first) * side / count
    slope, start = np.polyfit(np.flatnonzero(straight) + 0.5, levels[straight] / 255 * side, 1)
    return float(start), float(start + slope * len(levels))
