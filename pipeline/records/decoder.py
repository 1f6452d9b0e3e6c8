"""The one decoder that every stage uses: the bytes of an image file -> an upright RGB picture.

Of a file's metadata only its size and its orientation are looked at. What else it says, and how broken that is, costs no
picture: where a library stumbles over it, the file is read again without it (`metadata.py`).
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.core import RESOURCE, PipelineError, brief
from pipeline.records.images import MAX_FILE, ImageError
from pipeline.records.metadata import without_metadata
from pipeline.records.other_kinds import kind_of

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # parsers an image may reach; EPS would start another program
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded
MAX_WEBP = 64_000_000  # pixels of a WebP, for each of which its decoder takes sixteen bytes
MAX_RATIO = 200  # of the sides: a strip, resized until its short side fits an encoder, would take gigabytes
MAX_SCANNED = 2_000_000_000  # pixels times scans of a JPEG: each scan goes over all of them, and a file may hold thousands
MAX_RUNS = 8 << 20  # bytes of a run-length BMP, which is decoded by an interpreted loop
DECODER = 1  # part of every feature's fingerprint: raise it when a decoded pixel can change
STRIP = 1 << 22  # pixels that are converted at once
ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_size(size: tuple[int, int], *, where: str) -> None:
    """Raises `ImageError` for a picture of too many pixels, or so narrow that resizing it would make too many."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}×{height} pixels, more than {MAX_PIXELS:,}", where=where)
    if max(size) > MAX_RATIO * min(size):
        raise ImageError(f"{width}×{height} pixels, its sides more than {MAX_RATIO} to 1", where=where)


def unknown_kind(data: bytes, *, where: str) -> ImageError:
    """The error for a file that no decoder takes: what it is and what converts it, where that is known."""
    if found := kind_of(data):
        return ImageError(f"a picture of kind {found[0]}, which is not read", where=where, remedy=found[1])
    return ImageError(f"not a picture in a known format ({', '.join(FORMATS)})", where=where)


def decode(data: bytes, *, where: str) -> Image.Image:
    """Image file -> upright RGB picture: first frame, EXIF orientation applied, transparency on white, 16 bits scaled.

    Raises `ImageError` whatever the decoder raised: 38 of 40,000 damaged files raise something other than OSError.
    """
    if not data:
        raise ImageError("empty file", where=where)
    if len(data) > MAX_FILE:
        raise ImageError(f"{len(data):,} bytes, more than {MAX_FILE:,}", where=where)
    try:
        return _decode(data, where)
    except ImageError:
        raise
    except MemoryError:  # size and bytes are bounded, so this machine is short of it, and the picture is not to blame
        raise PipelineError("no memory left to decode it", where=where, remedy="lower runtime.workers", code=RESOURCE) from None
    except Exception as error:
        return _decode_again(data, where, error)


def _decode_again(data: bytes, where: str, error: Exception) -> Image.Image:
    """Without the parts that decide no pixel; raises `ImageError` for the first error where that does not help."""
    try:
        if plain := without_metadata(data):
            return _decode(plain[0], where, plain[1])
    except ImageError:
        raise
    except Exception:
        pass
    if isinstance(error, Image.DecompressionBombError):
        raise ImageError(f"more than {MAX_PIXELS:,} pixels", where=where) from None
    if isinstance(error, UnidentifiedImageError):
        raise unknown_kind(data, where=where) from None
    raise ImageError(f"not a picture that can be decoded: {brief(error)}", where=where) from None


def _decode(data: bytes, where: str, exif: bytes | None = None) -> Image.Image:
    """`exif`: the metadata that `data` had, where they are no longer in it."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(image.size, where=where)
        _check_work(image, data, where)
        image.load()
        turn = _UPRIGHT.get(_orientation(image, exif))
        if turn is None:
            return _to_rgb(image, where)
        upright = image.transpose(turn)
        image.close()  # of a large picture one copy at a time
        return _to_rgb(upright, where)


def _check_work(image: Image.Image, data: bytes, where: str) -> None:
    """Raises `ImageError` for a file that decodes for minutes, or in gigabytes, although its picture is small enough."""
    pixels = image.width * image.height
    if image.format == "WEBP" and pixels > MAX_WEBP:
        raise ImageError(f"a WebP of {image.width}×{image.height} pixels, more than {MAX_WEBP:,}", where=where)
    if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) * pixels > MAX_SCANNED:
        raise ImageError(f"{scans:,} scans of {pixels:,} pixels, more than {MAX_SCANNED:,} in all", where=where)
    tiles = getattr(image, "tile", None) or [("",)]
    if image.format == "BMP" and len(data) > MAX_RUNS and tiles[0][0] == "bmp_rle":
        raise ImageError(f"a run-length BMP of {len(data):,} bytes, more than {MAX_RUNS:,}", where=where)


def _orientation(image: Image.Image, exif: bytes | None) -> int:
    """1 to 8, by Exif or XMP; 1 where they are broken or say anything else."""
    try:
        found = image.getexif()
        if exif is not None:
            found.load(exif)
        value = found.get(ORIENTATION, 1)
    except Exception:  # metadata raise whatever they like, and no picture is lost for it
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion cuts everything above 255 off
        return _in_strips(image, lambda part: _from_16_bits(part, where))
    if image.mode == "F":
        raise ImageError("floating-point pixels", where=where)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image, where: str) -> Image.Image:
    values = np.asarray(image.convert("I"), dtype=np.float64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("32-bit pixels: neither 8 nor 16 bits a channel", where=where)
    return Image.fromarray((values / 257 + 0.5).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    over = image.convert("RGBA")
    white = Image.new("RGBA", over.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, over).convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The same pixels as `convert(image)`, whose copies of a large picture would take gigabytes."""
    width, height = image.size
    if width * height <= STRIP:
        return convert(image)
    whole, rows = Image.new("RGB", image.size), max(1, STRIP // width)
    for top in range(0, height, rows):
        whole.paste(convert(image.crop((0, top, width, min(height, top + rows)))), (0, top))
    return whole
