"""Images: every mode and orientation is the same upright RGB picture, damage is an `ImageError`, names stay in their root."""

import io
import multiprocessing
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.core.errors import PipelineError
from pipeline.records import decoder
from pipeline.records.decoder import MAX_PIXELS, decode
from pipeline.records.images import ImageError, ImageRoot, digest

RAMP = np.tile(np.arange(0, 240, 30, dtype=np.uint8), (4, 1))  # [4, 8], every column another grey


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    picture = decode(data, where="x.png")
    assert picture.mode == "RGB"
    return np.asarray(picture)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def palette(*, transparent: int | None = None) -> bytes:
    image = Image.new("P", (8, 4))
    image.putdata((RAMP // 30).ravel().tolist())
    image.putpalette([channel for step in range(8) for channel in (step * 30, 0, 255 - step * 30)])
    return saved(image, **({} if transparent is None else {"transparency": transparent}))


COLOURED = np.stack([RAMP, np.zeros_like(RAMP), 255 - RAMP], axis=2)
ON_WHITE = COLOURED.copy()
ON_WHITE[:, 3] = 255
CLEAR = np.where(np.arange(8) == 3, 0, 255).astype(np.uint8)[None, :].repeat(4, 0)  # alpha: column 3 is transparent
GREY_ON_WHITE = np.where(CLEAR == 0, 255, RAMP).astype(np.uint8)

MODES: dict[str, tuple[bytes, np.ndarray]] = {
    "RGB": (saved(Image.fromarray(COLOURED)), COLOURED),
    "L": (saved(Image.fromarray(RAMP)), grey(RAMP)),
    "L with transparency": (saved(Image.fromarray(RAMP), transparency=90), grey(GREY_ON_WHITE)),
    "P": (palette(), COLOURED),
    "P with transparency": (palette(transparent=3), ON_WHITE),
    "RGBA": (saved(Image.fromarray(np.dstack([COLOURED, CLEAR]))), ON_WHITE),
    "LA": (saved(Image.merge("LA", (Image.fromarray(RAMP), Image.fromarray(CLEAR)))), grey(GREY_ON_WHITE)),
    "half transparent": (saved(Image.new("RGBA", (8, 4), (0, 0, 0, 128))), np.full((4, 8, 3), 127, np.uint8)),
    "CMYK": (saved(Image.fromarray(255 - COLOURED).convert("CMYK"), "TIFF"), 255 - COLOURED),
    "I;16": (saved(Image.fromarray(RAMP.astype(np.uint16) * 257)), grey(RAMP)),
    "I;16B": (saved(Image.fromarray((RAMP.astype(np.uint16) * 257).astype(">u2")), "TIFF"), grey(RAMP)),
    "1": (saved(Image.fromarray(RAMP > 100)), grey(np.where(RAMP > 100, 255, 0).astype(np.uint8))),
    "GIF": (saved(Image.fromarray(RAMP), "GIF"), grey(RAMP)),
    "two frames": (saved(Image.fromarray(RAMP), "GIF", save_all=True, append_images=[Image.fromarray(RAMP[:, ::-1])]), grey(RAMP)),
    "WEBP": (saved(Image.fromarray(COLOURED), "WEBP", lossless=True), COLOURED),
    "BMP": (saved(Image.fromarray(COLOURED), "BMP"), COLOURED),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_its_picture_in_rgb_on_white(mode: str) -> None:
    data, expected = MODES[mode]
    assert np.abs(pixels(data).astype(int) - expected).max() <= 1


def test_an_inverted_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    found = pixels(saved(red.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(found.astype(int) - np.asarray(red)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_exif_orientation_gives_the_same_upright_picture(orientation: int, kind: str) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # the inverse of what a viewer does, as Transpose numbers
    stored = upright
    for number in turns.get(orientation, []):
        stored = stored.transpose(Image.Transpose(number))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(_with(stored, exif))), np.asarray(upright)), "the test's own table"
    assert np.array_equal(pixels(saved(stored, kind, exif=exif)), np.asarray(upright))


def _with(image: Image.Image, exif: Image.Exif) -> Image.Image:
    again: Image.Image = Image.open(io.BytesIO(saved(image, exif=exif)))
    again.load()
    return again


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than anyone has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "known format"),
    "half a PNG": (saved(NOISE)[:2000], "decoded"),
    "half a JPEG": (saved(NOISE, "JPEG")[:600], "decoded"),
    "a header alone": (saved(NOISE)[:20], "decoded"),
    "a bomb": (bomb(60_000, 60_000), "pixels"),
    "just too large": (bomb(MAX_PIXELS // 1000 + 1, 1000), "pixels"),
    "a strip": (saved(Image.new("RGB", (1, 201))), "its sides more than 200 to 1"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "known format"),
    "floating point": (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point"),
    "32 bits": (saved(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "32-bit"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_an_image_error_that_names_it(kind: str) -> None:
    data, said = DAMAGED[kind]
    with pytest.raises(ImageError, match=said) as caught:
        decode(data, where="folder: bad.png")
    assert caught.value.line().startswith("folder: bad.png: ")
    assert len(caught.value.line().splitlines()) == 1


def test_a_webp_may_have_fewer_pixels_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MAX_WEBP", 1599)
    assert decode(saved(NOISE), where="x.png").size == (40, 40)
    with pytest.raises(ImageError, match="a WebP of 40×40 pixels"):
        decode(saved(NOISE, "WEBP"), where="x.webp")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_mutated_files_give_a_picture_or_an_image_error() -> None:
    chance = random.Random(0)
    sources = [saved(NOISE, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    refusals: list[str] = []
    for number in range(300):
        data = bytearray(sources[number % len(sources)])
        for _ in range(chance.choice((1, 3, 20))):
            data[chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 100))] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        try:
            assert decode(bytes(data), where="x").mode == "RGB"
        except ImageError as error:
            refusals.append(error.line())
    assert all(len(line.splitlines()) == 1 for line in refusals)
    assert 50 < len(refusals) < 250, "some of each, or the test mutates too little or too much"


@pytest.fixture
def roots(tmp_path: Path, png: Callable[[int], bytes]) -> dict[str, ImageRoot]:
    """The same three files in a folder and in a zip, and something secret beside them."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(9))
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too" / "secret.png").write_bytes(png(9))
    names = ["a.png", "sub/b.png", "ä .png"]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number, name in enumerate(names):
            (folder / name).write_bytes(png(number))
            archive.writestr(name, png(number))
    return {"folder": ImageRoot(folder), "zip": ImageRoot(tmp_path / "images.zip")}


def read_all(root: ImageRoot) -> list[bytes]:
    return [root.read(name) for name in ("a.png", "sub/b.png", "ä .png", "a.png")]


def test_a_folder_and_a_zip_give_the_same_bytes(roots: dict[str, ImageRoot], png: Callable[[int], bytes]) -> None:
    assert read_all(roots["folder"]) == read_all(roots["zip"]) == [png(0), png(1), png(2), png(0)]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_root_works_pickled_and_in_a_forked_worker_after_use(roots: dict[str, ImageRoot], kind: str) -> None:
    root = roots[kind]
    expected = read_all(root)
    assert read_all(pickle.loads(pickle.dumps(root))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(root.read, ["a.png", "sub/b.png"] * 20) == expected[:2] * 20
    assert read_all(root) == expected


def test_forked_workers_that_read_a_zip_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """One file position shared by two processes would mix their members up."""
    members = {f"{number}.bin": bytes([number]) * 300_000 for number in range(6)}
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    root = ImageRoot(tmp_path / "images.zip")
    root.read("0.bin")

    def read_all_of_them() -> None:
        assert all(root.read(name) == data for name, data in list(members.items()) * 50)

    workers = [multiprocessing.get_context("fork").Process(target=read_all_of_them, daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


ESCAPES = ["../secret.png", "/etc/hostname", "sub/../../secret.png", "../images-too/secret.png", "out.png", "outer/secret.png",
           "missing.png", "", ".", "sub", "pipe", "loop",
           "outer/../../secret.png", "a\0b", "http://localhost/a.png", "x" * 5000, "\udc80.png"]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leaves_the_root_or_is_no_file_is_an_image_error(roots: dict[str, ImageRoot], kind: str, name: str) -> None:
    folder = Path(roots["folder"].path)
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "outer").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    with pytest.raises(ImageError) as caught:
        (ImageRoot(folder, follow=False) if kind == "folder" else roots[kind]).read(name)
    assert repr(name)[:20] in caught.value.line()
    assert str(roots[kind].path) in caught.value.line()


def test_a_link_within_the_root_is_followed(roots: dict[str, ImageRoot]) -> None:
    folder = Path(roots["folder"].path)
    (folder / "link.png").symlink_to(folder / "sub" / "b.png")
    assert roots["folder"].read("link.png") == roots["folder"].read("sub/b.png")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("place", range(40, 2000, 97))
def test_a_damaged_zip_member_is_an_image_error(tmp_path: Path, png: Callable[[int], bytes], method: int, place: int) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
        archive.writestr("a.png", png(0) if method == zipfile.ZIP_STORED else bytes(range(256)) * 8 + png(0))
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[place] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.png"):
        ImageRoot(tmp_path / "images.zip").read("a.png")


def test_a_zip_whose_list_is_damaged_is_an_error_that_names_it(tmp_path: Path, png: Callable[[int], bytes]) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png(0))
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x00"))
    with pytest.raises(PipelineError, match=r"images\.zip"):
        ImageRoot(path).read("a.png")


@pytest.mark.parametrize(("content", "said"), [(None, "no such folder or zip"), (b"not a zip", "neither a folder nor a zip")])
def test_a_root_that_is_neither_folder_nor_zip_is_an_error(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "root").write_bytes(content)
    with pytest.raises(PipelineError, match=said):
        ImageRoot(tmp_path / "root")


@pytest.mark.parametrize("kind", [PipelineError, ImageError])
def test_an_error_survives_the_way_back_from_a_worker(kind: type[PipelineError]) -> None:
    error = kind("no such image", where="folder: 'a.png'", remedy="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.line(), again.code) == (kind, str(error), error.line(), error.code)


def test_an_image_is_its_bytes(png: Callable[[int], bytes]) -> None:
    assert digest(png(0)) == digest(png(0)) != digest(png(1))
    assert len(digest(b"")) == 32
