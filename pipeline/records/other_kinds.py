"""Pictures of kinds that are not decoded, told by their first bytes, so that their owner learns what converts them."""

import re

HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # brands of ISO 23008-12
AVIF = {b"avif", b"avis"}
OTHERS = (
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "JPEG XL", "jxl"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000", "jp2"),
    (re.compile(rb"8BPS"), "Photoshop", "psd"),
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,900}?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg\b", re.DOTALL), "SVG", "svg"),
    (re.compile(rb"%PDF-"), "PDF", "pdf"),
)


def kind_of(data: bytes) -> tuple[str, str] | None:
    """The name of a known kind that is not read and the command that converts it; None for anything else."""
    head = data[:1024]
    if head[4:8] == b"ftyp":
        size = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, size, 4))}  # the major one, then the compatible ones
        if found := next(((name, suffix) for known, name, suffix in _BOXES if brands & known), None):
            return found[0], _command(found[1])
        return None
    return next(((name, _command(suffix)) for sign, name, suffix in OTHERS if sign.match(head)), None)


_BOXES = ((AVIF, "AVIF", "avif"), (HEIC, "HEIC", "heic"))  # AVIF first: it names mif1 as well


def _command(suffix: str) -> str:
    return f"convert it with ImageMagick, `magick mogrify -format jpg *.{suffix}`, and name the .jpg in the row"
