"""Of an image file's metadata only size and orientation count: whatever else it says, and however broken, the pixels come."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.records.decoder import decode
from pipeline.records.images import ImageError

HIGH, WIDE = 12, 20
PIXELS = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)
Entry = tuple[int, int, int, bytes]


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, kind, **options)
    return file.getvalue()


def block(*entries: Entry) -> bytes:
    """A TIFF block of (tag, type, count, four bytes)."""
    fields = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + fields + b"\0\0\0\0"


def exif(*entries: Entry) -> bytes:
    return b"Exif\0\0" + block(*entries)


TURNED = (0x0112, 3, 1, b"\x06\0\0\0")
TEXT_RESOLUTION = (0x011A, 2, 4, b"72\0\0")
UNIT = (0x0128, 3, 1, b"\x02\0\0\0")
FAR = (0x011A, 5, 1, b"\xff\xff\xff\x7f")
SIGNED = (0x011A, 9, 1, b"\xff\xff\xff\xff")
HUGE = (0x9286, 7, 0x7FFFFFFF, b"\x08\0\0\0")
SUB = (0x8769, 4, 1, b"\x08\0\0\0")  # an IFD within itself
ODD_TYPE = (0x010F, 99, 1, b"abcd")


def with_segment(marker: int, body: bytes) -> Callable[[bytes], bytes]:
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
    return lambda data: data[:2] + segment + data[2:]


def with_chunk(kind: bytes, body: bytes, *, crc: int | None = None) -> Callable[[bytes], bytes]:
    sum_ = zlib.crc32(kind + body) if crc is None else crc
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum_)
    return lambda data: data[:33] + chunk + data[33:]


XMP = b"http://ns.adobe.com/xap/1.0/\0"
LAUGHS = XMP + b'<!DOCTYPE x [<!ENTITY a "aaaa">' + b'<!ENTITY b "&a;&a;&a;">' * 400 + b"]><x>&b;</x>"
JPEG = {  # what is put into a JPEG: segment, body, whether the picture is turned by it
    "mistyped resolution": (0xE1, exif(TURNED, TEXT_RESOLUTION, UNIT), True),
    "resolution behind the end": (0xE1, exif(TURNED, FAR, UNIT), True),
    "signed resolution": (0xE1, exif(TURNED, SIGNED, UNIT), True),
    "a value of two gigabytes": (0xE1, exif(TURNED, HUGE), True),
    "a block within itself": (0xE1, exif(TURNED, SUB), True),
    "an unknown type": (0xE1, exif(ODD_TYPE, TURNED), True),
    "orientation as text": (0xE1, exif((0x0112, 2, 2, b"6\0\0\0")), False),
    "orientation 9": (0xE1, exif((0x0112, 3, 1, b"\x09\0\0\0")), False),
    "orientations": (0xE1, exif((0x0112, 3, 2, b"\x06\0\x06\0")), True),
    "cut block": (0xE1, exif(TURNED, TEXT_RESOLUTION)[:20], False),
    "no block": (0xE1, b"Exif\0\0", False),
    "noise": (0xE1, b"Exif\0\0" + bytes(range(200)), False),
    "laughing XMP": (0xE1, LAUGHS, False),
    "turned by XMP": (0xE1, XMP + b'<x tiff:Orientation="6"/>', True),
    "broken profile": (0xE2, b"ICC_PROFILE\0\x01\x05broken", False),
    "profile out of order": (0xE2, b"ICC_PROFILE\0", False),
    "broken MPO": (0xE2, b"MPF\0" + block((0xB001, 4, 1, b"\x03\0\0\0"), (0xB002, 7, 16, b"\xff\xff\xff\x7f")), False),
    "MPO of text": (0xE2, b"MPF\0" + block((0xB001, 2, 4, b"two\0")), False),
    "cut JFIF": (0xE0, b"JFIF", False),
    "JFIF of no density": (0xE0, b"JFIF\0\x01\x02\x09\0\0\0\0\0\0", False),
    "Photoshop": (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff", False),
    "cut Photoshop": (0xED, b"Photoshop 3.0\x008BIM\x03", False),
    "comment": (0xFE, b"\xff\xd8\xff\xda" * 100, False),
    "empty segment": (0xE7, b"", False),
}


@pytest.mark.parametrize("name", JPEG)
def test_a_jpeg_s_segments_decide_nothing_but_its_orientation(name: str) -> None:
    marker, body, turned = JPEG[name]
    plain = saved("JPEG", quality=95)
    found = np.asarray(decode(with_segment(marker, body)(plain), where="x"))
    wanted = np.asarray(decode(plain, where="x"))
    assert np.array_equal(found, np.rot90(wanted, -1) if turned else wanted)


BOMB = zlib.compress(bytes(200 << 20), 9)  # 200 MB from 200 KB
PNG = {
    "text bomb": (with_chunk(b"zTXt", b"k\0\0" + BOMB), False),
    "long text": (with_chunk(b"tEXt", b"k\0" + b"x" * (2 << 20)), False),
    "international bomb": (with_chunk(b"iTXt", b"k\0\x01\0\0\0" + BOMB), False),
    "profile bomb": (with_chunk(b"iCCP", b"k\0\0" + BOMB), False),
    "profile of an unknown method": (with_chunk(b"iCCP", b"k\0\x07abc"), False),
    "many texts": (lambda data: data[:33] + 80 * with_chunk(b"tEXt", b"k\0" + b"x" * 900_000)(data[:33])[33:] + data[33:], False),
    "text of a wrong checksum": (with_chunk(b"tEXt", b"k\0v", crc=7), False),
    "short density": (with_chunk(b"pHYs", b"\0\0"), False),
    "short gamma": (with_chunk(b"gAMA", b"\0"), False),
    "short chromaticity": (with_chunk(b"cHRM", b"\0" * 5), False),
    "empty sRGB": (with_chunk(b"sRGB", b""), False),
    "short animation": (with_chunk(b"acTL", b"\0"), False),
    "animation of no frames": (with_chunk(b"acTL", bytes(8)), False),
    "orientation": (with_chunk(b"eXIf", block(TURNED, TEXT_RESOLUTION)), True),
    "orientation of a wrong checksum": (with_chunk(b"eXIf", block(TURNED), crc=7), True),
    "broken exif": (with_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), False),
    "exif as text": (with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  8\nzzzz"), False),
    "turned by XMP": (with_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'), True),
    "unknown chunk": (with_chunk(b"quUx", b"abc"), False),
}  # fmt: skip


@pytest.mark.parametrize("name", PNG)
def test_a_png_s_chunks_decide_nothing_but_its_orientation(name: str) -> None:
    change, turned = PNG[name]
    found = np.asarray(decode(change(saved("PNG")), where="x"))
    assert np.array_equal(found, np.rot90(PIXELS, -1) if turned else PIXELS)


def test_the_rest_of_a_file_still_counts() -> None:
    """Read again without its metadata, a damaged picture is as bad as before."""
    broken = with_chunk(b"zTXt", b"k\0\0" + BOMB)(saved("PNG"))
    for data in (broken[:-30], broken.replace(b"IDAT", b"IDAX"), with_segment(*JPEG["MPO of text"][:2])(saved("JPEG")[:200])):
        with pytest.raises(ImageError, match=r"^x: not a picture"):
            decode(data, where="x")


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (WIDE, HIGH), colour) for colour in ("red", "green", "blue")]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_pictures_the_first_one_counts(kind: str) -> None:
    first, *rest = frames()
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    found = decode(saved(kind, first, save_all=True, append_images=rest, **options), where="x")
    assert np.abs(np.asarray(found).astype(int) - np.asarray(first)).max() <= 1


def test_a_palette_with_transparency_lies_on_white() -> None:
    image = Image.fromarray((PIXELS[..., 0] % 4).astype(np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for transparency in (1, bytes([255, 0, 128])):
        found = np.asarray(decode(saved("PNG", image, transparency=transparency), where="x"))
        assert (found[np.asarray(image) == 1] == 255).all()
        assert (found[np.asarray(image) == 3] == 9).all()


def test_strips_of_a_large_picture_have_the_pixels_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    shades = Image.fromarray(rng.integers(0, 65536, (HIGH, WIDE), dtype=np.uint16))
    clear = Image.fromarray(rng.integers(0, 256, (HIGH, WIDE, 4), dtype=np.uint8), "RGBA")
    few = Image.fromarray(rng.integers(0, 5, (HIGH, WIDE), dtype=np.uint8), "P")
    few.putpalette(rng.integers(0, 256, 15, dtype=np.uint8).tolist())
    files = [saved("PNG", shades), saved("PNG", clear), saved("PNG", few, transparency=bytes([0, 9, 99, 200]))]
    whole = [np.asarray(decode(data, where="x")) for data in files]
    monkeypatch.setattr("pipeline.records.decoder.STRIP", 3 * WIDE)
    for data, wanted in zip(files, whole, strict=True):
        assert np.array_equal(np.asarray(decode(data, where="x")), wanted)


def test_files_that_decode_for_minutes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = saved("JPEG", progressive=True)
    at = scanned.index(b"\xff\xda")
    with pytest.raises(ImageError, match=r"scans of 240 pixels, more than 2,000,000,000 in all"):
        decode(scanned[:at] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 9_000_000 + scanned[at:], where="x")
    runs = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54 + 1024) + struct.pack("<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, 0, 0, 0, 256, 0)
    with pytest.raises(ImageError, match="run-length BMP"):
        decode(runs + bytes(1024) + b"\x01\x01" * (5 << 20), where="x")
    monkeypatch.setattr("pipeline.records.decoder.MAX_FILE", 1000)
    with pytest.raises(ImageError, match="5,000 bytes, more than 1,000"):
        decode(bytes(5000), where="x")


def test_random_metadata_cost_no_picture() -> None:
    rng = np.random.default_rng(2)
    plain = saved("JPEG")
    for _ in range(300):
        entries = [
            (int(rng.choice([0x0112, 0x011A, 0x0128, 0x8769, 0x8825, 0x9286, 0xA005])), int(rng.integers(0, 14)),
             int(rng.choice([0, 1, 2, 40, 2**31 - 1])), rng.bytes(4)) for _ in range(int(rng.integers(1, 6)))
        ]  # fmt: skip
        body = exif(*entries)
        marker, prefix = (0xE1, body) if rng.random() < 0.7 else (0xE2, b"MPF\0" + body[6:])
        assert sorted(decode(with_segment(marker, prefix)(plain), where="x").size) == [HIGH, WIDE]
