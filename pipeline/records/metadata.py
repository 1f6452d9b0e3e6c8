"""An image file without the parts that decide no pixel: for files whose metadata a library stumbles over.

JPEG: kept are JFIF's and Adobe's segments, by which decoders tell colours, of the sizes that those have. PNG: kept are the
chunks that a decoder must know, and transparency; an animation's other frames go too.
"""

import struct
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_KEPT_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_COMMENT, _SCAN = 0xFE, 0xDA
_LONGEST_EXIF = 1 << 20


def without_metadata(data: bytes) -> tuple[bytes, bytes | None] | None:
    """The rest of the file, and its Exif block; None for other formats, and where its parts cannot be told apart."""
    kept: list[bytes] = []
    exif = None
    try:
        parts = _png(data) if data.startswith(_PNG) else _jpeg(data) if data.startswith(b"\xff\xd8") else None
        for is_kept, part, block in parts or ():
            if is_kept:
                kept.append(part)
            elif exif is None and block and len(block) <= _LONGEST_EXIF:
                exif = block
    except (struct.error, IndexError):
        return None
    return (b"".join(kept), exif) if kept else None


def _png(data: bytes) -> Iterator[tuple[bool, bytes, bytes | None]]:
    """Each part, whether it is kept, and of an Exif one its block."""
    yield True, _PNG, None
    at = len(_PNG)
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        part = data[at : at + size + 12]
        if len(part) < size + 12:
            raise IndexError
        yield kind in _KEPT_CHUNKS, part, part[8:-4] if kind == b"eXIf" else None
        at += len(part)
        if kind == b"IEND":
            return


def _jpeg(data: bytes) -> Iterator[tuple[bool, bytes, bytes | None]]:
    yield True, data[:2], None
    at = 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # markers may be filled up
            at += 1
        if data[at] != 0xFF:
            raise IndexError
        marker = data[at + 1]
        (size,) = struct.unpack_from(">H", data, at + 2)
        part = data[at : at + 2 + size]
        if len(part) < 2 + size or size < 2:
            raise IndexError
        if marker == _SCAN:
            yield True, data[at:], None
            return
        body = part[4:]
        if marker == 0xE0:
            kept = body.startswith(b"JFIF\0") and len(body) >= 14
        elif marker == 0xEE:
            kept = body.startswith(b"Adobe") and len(body) >= 12
        else:
            kept = marker != _COMMENT and not 0xE1 <= marker <= 0xEF
        yield kept, part, body[6:] if marker == 0xE1 and body.startswith(b"Exif\0\0") else None
        at += len(part)
