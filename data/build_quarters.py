"""Four easy-VQA pictures in one: a task where place and detail matter, to see what merging tokens costs.

Reads data/easyvqa (build_dataset.py made it). Writes data/quarters/: pictures of 128 x 128, each of four of 64 x 64, in one
archive, a caption of each (pretraining) and the colour and the shape of each quarter as questions, for training and held out.
Held-out pictures are made of easy-VQA's held-out ones alone. The embedded encoder reads 64 x 64, half of that, so only pictures
whose shape is large enough to survive halving are taken. Seeded: the same bytes every time.
"""

import io
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageChops

DATA = Path(__file__).parent
SOURCE, OUT = DATA / "easyvqa", DATA / "quarters"
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = {"train": 4000, "test": 1000}  # pictures
SUFFIXES = {"train": "", "test": "_heldout"}
SIDE = 64
LEAST = 24  # pixels of a shape's longer side: one and a half of the encoder's patches, once halved
APART = 16  # levels of a channel, from which on a pixel is not the ground's


def captions(split: str) -> dict[str, str]:
    """easy-VQA's picture -> what it shows: "a blue circle"."""
    lines = (SOURCE / f"captions{SUFFIXES[split]}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["images"][0]: row["messages"][1]["content"].rstrip(".").replace("A ", "a ", 1) for row in rows}


def extent(picture: Image.Image) -> int:
    """The longer side of what stands out from the ground, the picture's most frequent colour, in pixels."""
    colours = picture.getcolors(SIDE * SIDE) or []
    ground = Image.new("RGB", picture.size, max(colours)[1])
    apart = [band.point(lambda level: 255 * (level > APART)) for band in ImageChops.difference(picture, ground).split()]
    box = ImageChops.lighter(ImageChops.lighter(apart[0], apart[1]), apart[2]).getbbox()
    return max(box[2] - box[0], box[3] - box[1]) if box else 0


def join(pictures: list[Image.Image]) -> bytes:
    """PNG of four pictures, in the order of QUARTERS."""
    sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % 2 * SIDE, number // 2 * SIDE))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def exchanges(scenes: list[str]) -> Iterator[tuple[str, str]]:
    """Question and answer about every quarter: its colour and its shape."""
    for quarter, scene in zip(QUARTERS, scenes, strict=True):
        _, colour, shape = scene.split()
        yield f"what color is the shape at the {quarter}?", f"{colour.capitalize()}."
        yield f"what shape is at the {quarter}?", f"A {shape}."


def record(name: str, request: str, reply: str) -> str:
    """A line of a data file."""
    turns = [{"role": "user", "content": f"<image>\n{request}"}, {"role": "assistant", "content": reply}]
    return json.dumps({"images": [name], "messages": turns}, separators=(",", ":")) + "\n"


def main() -> None:
    """Build data/quarters anew."""
    OUT.mkdir(exist_ok=True)
    with zipfile.ZipFile(SOURCE / "images.zip") as source, zipfile.ZipFile(OUT / "images.zip", "w") as archive:
        for split, count in COUNTS.items():
            shown, draw = captions(split), random.Random(split)
            pictures = {name: Image.open(io.BytesIO(source.read(name))).convert("RGB") for name in sorted(shown)}
            large = [name for name, picture in pictures.items() if extent(picture) >= LEAST]
            described, asked = [], []
            for number in range(count):
                names, name = draw.sample(large, 4), f"{split}/{number}.png"
                scenes = [shown[picture] for picture in names]
                archive.writestr(zipfile.ZipInfo(name), join([pictures[picture] for picture in names]))
                caption = ", ".join(f"{quarter} {scene}" for quarter, scene in zip(QUARTERS, scenes, strict=True))
                described.append(record(name, "Describe the image.", f"{caption.capitalize()}."))
                asked += [record(name, *exchange) for exchange in exchanges(scenes)]
            for kind, lines in (("captions", described), ("questions", asked)):
                (OUT / f"{kind}{SUFFIXES[split]}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
                print(f"{kind}{SUFFIXES[split]}.jsonl: {len(lines):,} records")


if __name__ == "__main__":
    main()
