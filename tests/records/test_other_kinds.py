"""Pictures of kinds that are not read are told by name, with the command that converts them, in every place that decodes."""

import io

import pytest
from PIL import Image, features

from pipeline.check.pictures import read_header
from pipeline.records import ImageError, decode

KINDS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
    "HEIC of another camera": b"\0\0\0\x18ftypmif1\0\0\0\0miafheix" + bytes(64),
    "AVIF": b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(64),
    "JPEG XL": b"\xff\x0a" + bytes(64),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
    "Photoshop": b"8BPS\0\1" + bytes(64),
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [decode, read_header])
def test_a_known_kind_is_named_with_what_converts_it(kind: str, read: object) -> None:
    with pytest.raises(ImageError) as caught:
        read(KINDS[kind], where="a")  # type: ignore[operator]
    assert f"a picture of kind {kind.split(' of ')[0]}, which is not read" in caught.value.line()
    assert "magick mogrify -format jpg" in caught.value.line()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_a_real_avif_is_named() -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "AVIF")
    with pytest.raises(ImageError, match="kind AVIF"):
        decode(file.getvalue(), where="a")


@pytest.mark.parametrize(
    "data", [b"<html>404</html>", b"\0\0\0\x14ftypisom\0\0\0\0isom" + bytes(9), b"\0\0\0\0ftyp", b"x", bytes(2000)]
)
def test_what_is_none_of_them_is_not_named_one(data: bytes) -> None:
    with pytest.raises(ImageError, match="known format"):
        decode(data, where="a")
